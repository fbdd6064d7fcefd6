"""A compact convolutional transformer for 32-pixel images (after Hassani et al. 2021, arXiv 2104.05704): 0.3 M parameters.

Two convolutions make 64 tokens; two pre-norm encoder layers; attention over the tokens pools them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WIDTH, HEADS, HIDDEN, DEPTH = 128, 4, 256, 2


class Attention(nn.Module):
    """Self-attention with fused projections."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, tokens, width) -> the same shape."""
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """One pre-norm encoder layer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2, self.drop = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, tokens, width) -> the same shape."""
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class CompactTransformer(nn.Module):
    """Images (n, 3, 32, 32) to logits (n, 10)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.position = nn.Parameter(torch.randn(1, 64, WIDTH) * 0.02)
        self.encoders = nn.ModuleList(Encoder(dropout) for _ in range(DEPTH))
        self.norm, self.pool, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2).flatten(2).transpose(1, 2) + self.position
        for encoder in self.encoders:
            x = encoder(x)
        x = self.norm(x)
        return self.head((self.pool(x).softmax(1).transpose(1, 2) @ x).flatten(1))


def compact_transformer() -> nn.Module:
    """The network, untrained."""
    torch.manual_seed(0)
    return CompactTransformer()
