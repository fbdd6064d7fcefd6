"""A user's model file: networks for 8x8 grey images, and some that cannot be compressed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (0.305,), (0.376,)


class Block(nn.Module):
    """A residual block; where the width changes, the shortcut is a projection or is padded with zeros."""

    def __init__(self, inputs: int, outputs: int, padded: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.added = outputs - inputs
        self.shortcut: nn.Module = nn.Identity()
        if self.added and not padded:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
            self.added = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = self.shortcut(x)
        if self.added:
            x = F.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(y + x)


class Net(nn.Module):
    """Three residual blocks, 16 and 32 wide."""

    def __init__(self, classes: int, padded: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = Block(16, 32, padded), Block(32, 32, padded), Block(32, 32, padded)
        self.fc = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(y))).mean(dim=(2, 3)))


class Attention(nn.Module):
    """Four heads of eight dimensions over sixteen patches."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Two pre-norm blocks over the patches of a convolution, as torch.fx cannot trace them: sizes come from shapes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.patch = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, width, 2, 2)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        self.attentions = nn.ModuleList(Attention(width) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(F.relu(self.stem(x))).flatten(2).transpose(1, 2) + self.position
        if x.shape[1] != 16:
            raise ValueError("sixteen patches")
        for k, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * k](x))
            x = x + mlp(self.norms[2 * k + 1](x))
        return self.head(self.norms[4](x).mean(1))


def projected() -> nn.Module:
    return Net(10, padded=False)


def padded() -> nn.Module:
    return Net(10, padded=True)


def attending() -> nn.Module:
    return Transformer()


def sized(num_classes: int) -> nn.Module:
    return Net(num_classes, padded=False)


def failing() -> nn.Module:
    raise OSError("the licence server\ndoes not answer")


def nothing() -> None:
    return None


class Branching(Block):
    """Asks its input which way to go."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(-x if x.sum() > 0 else x)


class Shared(Net):
    """Runs one layer twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer2(self.layer1(y))
        y = F.relu(self.layer3.conv1(self.layer3.conv1(y)))
        return self.fc(y.mean(dim=(2, 3)))


class Pooling(nn.Module):
    """No layer that could lose anything."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(F.adaptive_avg_pool2d(x, (2, 5)).flatten(1))


class Single(nn.Module):
    """One layer from the image to the classes: it can lose neither."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv2d(1, 10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x).mean(dim=(2, 3))


class Sizeable(nn.Module):
    """Takes images of 8x8 and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


def branching() -> nn.Module:
    network = Net(10, padded=False)
    network.layer2 = Branching(32, 32, padded=False)
    return network


def shared() -> nn.Module:
    return Shared(10, padded=False)


def pooling() -> nn.Module:
    return Pooling()


def single() -> nn.Module:
    return Single()


def sizeable() -> nn.Module:
    return Sizeable()
