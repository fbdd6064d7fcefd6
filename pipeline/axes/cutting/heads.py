"""nn.MultiheadAttention whose heads need not fill the width: its own forward ties heads x dimensions to the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import BuildError


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """Attention with `num_heads` heads whose dimensions follow from the projections; parameters keep their names."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As nn.MultiheadAttention's forward."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(t, which) for which, t in enumerate((query, key, value)))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        scale = self.__dict__["_scale"]
        weights: torch.Tensor | None = None
        if need_weights:
            scores = (q * scale) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = F.dropout(weights, dropout, training=dropout > 0) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and mask is None, scale=scale)
        result = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), weights

    def _heads(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """(batch, heads, tokens, dimensions) of query (0), key (1) or value (2)."""
        if self.in_proj_weight is not None:
            weight = self.in_proj_weight.chunk(3)[which]
        else:
            weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[which]
        bias = self.in_proj_bias.chunk(3)[which] if self.in_proj_bias is not None else None
        y = F.linear(x, weight, bias)
        return y.reshape(*y.shape[:-1], self.num_heads, -1).transpose(1, 2)

    @staticmethod
    def _mask(attn_mask: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
        parts: list[torch.Tensor] = []
        if attn_mask is not None:
            parts.append(attn_mask if attn_mask.dim() < 3 else attn_mask.reshape(q.shape[0], -1, *attn_mask.shape[1:]))
        if padding is not None:
            parts.append(padding[:, None, None, :])
        floats = [torch.zeros_like(p, dtype=q.dtype).masked_fill(p, float("-inf")) if p.dtype == torch.bool else p for p in parts]
        return None if not floats else floats[0] if len(floats) == 1 else floats[0] + floats[1]


def shrink(part: nn.MultiheadAttention, heads: int) -> None:
    """Give an attention whose projections have been cut its new number of heads.

    Raises:
        BuildError: it appends keys of its own.
    """
    if part.bias_k is not None or part.add_zero_attn:
        raise BuildError("nn.MultiheadAttention", found="add_bias_kv or add_zero_attn", expected="neither, to be cut")
    part.__dict__["_scale"] = part.__dict__.get("_scale", float(part.head_dim) ** -0.5)
    part.num_heads = heads
    part._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fused path, which ties heads to the width
    part.__class__ = PrunedMultiheadAttention


def reads_less(part: nn.MultiheadAttention) -> bool:
    """Whether the projections of an attention read fewer inputs than it was made for."""
    if part.in_proj_weight is not None:
        return bool(part.in_proj_weight.shape[1] != part.embed_dim)
    weights = (part.q_proj_weight, part.k_proj_weight, part.v_proj_weight)
    return any(w.shape[1] != n for w, n in zip(weights, (part.embed_dim, part.kdim, part.vdim), strict=True))


def in_steps(module: nn.Module) -> None:
    """Disable the fused path of torch's transformer encoders, which bypasses modules that were cut or left out."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.enable_nested_tensor = part.use_nested_tensor = False
        elif isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
