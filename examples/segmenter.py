"""A small U-Net that says for each pixel which digit it belongs to, if any."""

from __future__ import annotations

import torch
from scenes import CLASSES
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = 1 + CLASSES  # of pixels: background, then the digits


class Conv(nn.Sequential):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Up(nn.Module):
    """Features from below, at twice the size, joined with those that were there on the way down."""

    def __init__(self, below: int, beside: int) -> None:
        super().__init__()
        self.narrow, self.join = Conv(below, beside, 1), Conv(2 * beside, beside)

    def forward(self, below: Tensor, beside: Tensor) -> Tensor:
        """Features of the shape of `beside`."""
        larger = F.interpolate(self.narrow(below), scale_factor=2.0, mode="bilinear", align_corners=False)
        joined: Tensor = self.join(torch.cat([larger, beside], 1))
        return joined


class Segmenter(nn.Module):
    """Four steps down, to stride 16, three up again with what was there on the way down, and one to the pixels."""

    def __init__(self, widths: tuple[int, int, int, int] = (16, 32, 64, 160)) -> None:
        super().__init__()
        a, b, c, d = widths
        self.down2 = nn.Sequential(Conv(3, a, stride=2), Conv(a, a))
        self.down4 = nn.Sequential(Conv(a, b, stride=2), Conv(b, b))
        self.down8 = nn.Sequential(Conv(b, c, stride=2), Conv(c, c))
        self.down16 = nn.Sequential(Conv(c, d, stride=2), Conv(d, d), Conv(d, d))
        self.up8, self.up4, self.up2 = Up(d, c), Up(c, b), Up(b, a)
        self.pixels = nn.ConvTranspose2d(a, KINDS, 2, 2)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is found on the way down, at strides 2, 4, 8 and 16."""
        x2 = self.down2(images)
        x4 = self.down4(x2)
        x8 = self.down8(x4)
        return x2, x4, x8, self.down16(x8)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, kinds, H, W) of images (N, 3, H, W) whose sides are multiples of 16."""
        x2, x4, x8, x16 = self.features(images)
        logits: Tensor = self.pixels(self.up2(self.up4(self.up8(x16, x8), x4), x2))
        return logits
