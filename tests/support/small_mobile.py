"""A small network of separable convolutions, converted to TFLite."""

from __future__ import annotations

import torch
from edge_compress.pipeline.signature import image_signature
from torch import nn

SHAPE = (3, 32, 32)


def pointwise(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride)


def depthwise(channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, dilation * (kernel // 2), dilation, groups=channels)


class Mobile(nn.Module):
    """A stem, an inverted residual, a strided one, a last 1x1 convolution and a classifier."""

    def __init__(self, stem: nn.Module | None = None, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Conv2d(3, 16, 3, 2, 1)
        self.expand, self.inner, self.project = pointwise(16, 48), inner or depthwise(48), pointwise(48, 16)
        self.wide, self.down, self.narrow = pointwise(16, 48), depthwise(48, 5, 2), pointwise(48, 24)
        self.last, self.fc = pointwise(24, 320), nn.Linear(320, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.stem(x))
        x = x + self.project(nn.functional.relu6(self.inner(nn.functional.relu6(self.expand(x)))))
        x = self.narrow(nn.functional.relu6(self.down(nn.functional.relu6(self.wide(x)))))
        return self.fc(nn.functional.relu6(self.last(x)).mean((2, 3)))


def converted(net: nn.Module, zeros: float = 0.8) -> bytes:
    """The network's file, its 1x1 convolutions with a share of zeros, behind a normalisation of pixels."""
    from edge_compress.targets.tflite.convert import convert

    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            with torch.no_grad():
                layer.weight.mul_(torch.rand(layer.weight.shape) > zeros)
    return convert(net.eval(), image_signature(SHAPE), (0.5,) * 3, (0.5,) * 3)[0]
