"""Small transformers, one for each way attention is written; every one takes (N, 1, 8, 8)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, DEPTH = 32, 4, 8
Attention = Callable[[], nn.Module]


class Packed(nn.Module):
    """One projection for queries, keys and values; fused or written out; sizes from attributes or from the input."""

    def __init__(self, fused: bool = True, literal: bool = False, explicit: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused, self.literal, self.explicit = HEADS, DEPTH, fused, literal, explicit
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        per_head = c // self.num_heads if self.literal else self.head_dim
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, per_head).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.3 if self.explicit else None)
        else:
            y = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, t, c if self.literal else -1))


class Apart(nn.Module):
    """Three projections, (batch, heads, tokens, dimensions) by view and transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, DEPTH, WIDTH
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).permute(0, 2, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        y = torch.matmul((torch.matmul(q, k.transpose(-1, -2)) * 0.3).softmax(-1), v)
        y = y.permute(0, 2, 1, 3).contiguous()
        return self.out(y.view(*y.shape[:-2], self.all_head_size))


class Shared(nn.Module):
    """Grouped queries: two heads of keys and values for four of queries, repeated as Hugging Face does it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (p(x).view(n, t, -1, DEPTH).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (s[:, :, None].expand(n, s.shape[1], 2, t, DEPTH).reshape(n, -1, t, DEPTH) for s in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """Attention in shifted windows with a table of relative positions that has a head axis."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + 1
        self.register_buffer("index", apart[0] * 3 + apart[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        x = torch.roll(x.view(n, 4, 4, c), (-1, -1), (1, 2))
        x = x.view(n, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(x).reshape(x.shape[0], 4, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        y = ((q * 0.3) @ k.transpose(-2, -1) + bias[None]).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(x.shape[0], 4, -1))
        return y.view(n, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, t, c)


class TalkingHeads(nn.Module):
    """Heads mixed by linear layers before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(-2)
        return self.proj((self.after(a).permute(0, 3, 1, 2) @ v).transpose(1, 2).flatten(2))


class Torch(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, **more: object) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


class Einsum(nn.Module):
    """Attention in einsum's letters."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, DEPTH)) for p in (self.q, self.k, self.v))
        a = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return self.o(torch.einsum("bhij,bjhd->bihd", a, v).flatten(2))


class Gated(nn.Module):
    """SwiGLU: gate and value rows go together."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mlp(nn.Sequential):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH))


class PrimitiveRMSNorm(nn.Module):
    """RMSNorm in primitive operators, as in Hugging Face; epsilon is large enough to be seen.

    With `around_zero` the scale is 1 + weight, as in Gemma.
    """

    def __init__(self, width: int, around_zero: bool = False) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.around_zero = nn.Parameter(torch.rand(width)), 0.1, around_zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * (1.0 + self.weight.float()) if self.around_zero else self.weight * x.to(torch.float32)


class Transformer(nn.Module):
    """Patches, a position table, two pre-norm blocks with layer scale, a head."""

    def __init__(
        self,
        attention: Attention,
        mlp: Callable[[], nn.Module] = Mlp,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        tokens: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.patch = nn.Conv2d(1, WIDTH, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.attns, self.mlps = (nn.ModuleList(make() for _ in range(2)) for make in (attention, mlp))
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(4))
        self.scale = nn.Parameter(torch.full((WIDTH,), 1e-6))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for k, (attn, mlp) in enumerate(zip(self.attns, self.mlps, strict=True)):
            x = x + self.scale * attn(self.norms[2 * k](x))
            x = x + mlp(self.norms[2 * k + 1](x))
        return {**({"tokens": x} if self.tokens else {}), "logits": self.head(self.norm(x).mean(1))}


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "packed": lambda: Transformer(Packed),
    "packed_written_out": lambda: Transformer(lambda: Packed(fused=False)),
    "packed_with_a_scale": lambda: Transformer(lambda: Packed(explicit=True)),
    "packed_sizes_from_input": lambda: Transformer(lambda: Packed(literal=True)),
    "apart": lambda: Transformer(Apart),
    "shared_keys": lambda: Transformer(Shared),
    "windows": lambda: Transformer(Windows),
    "talking_heads": lambda: Transformer(TalkingHeads),
    "torch_attention": lambda: Transformer(Torch),
    "torch_attention_without_bias": lambda: Transformer(lambda: Torch(bias=False)),
    "einsum": lambda: Transformer(Einsum),
    "gated_mlp": lambda: Transformer(Packed, Gated),
    "rms_norm": lambda: Transformer(Packed, Gated, nn.RMSNorm),
    "rms_norm_narrow": lambda: Transformer(Packed, Gated, lambda width: nn.RMSNorm(width, 0.1), tokens=False),
    "rms_norm_around_zero": lambda: Transformer(Apart, Mlp, lambda width: PrimitiveRMSNorm(width, True), tokens=False),
    "rms_norm_written_out": lambda: Transformer(Apart, Mlp, PrimitiveRMSNorm, tokens=False),
    "encoder_layer": lambda: nn.Sequential(
        nn.Conv2d(1, WIDTH, 2, 2),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        nn.Flatten(),
        nn.Linear(512, 10),
    ),
}
