"""Convolutions that compute their weights become ordinary ones only where these answer the same."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.capture import Captured, capture
from torch import nn


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation, Qiao et al. 2019, with the padding of its superclass."""

    def standardised(self) -> torch.Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return (self.weight - mean) / (var + 1e-5).sqrt()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.standardised(), self.bias)


class SamePaddedConv2d(StandardisedConv2d):
    """Pads one row and column more at the end, as TensorFlow does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.standardised(), self.bias, self.stride)


class OneFilledConv2d(StandardisedConv2d):
    """Pads with ones."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1), value=1.0), self.standardised(), self.bias)


class ShiftedConv2d(nn.Conv2d):
    """Adds another parameter than its bias."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.shift = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(input, self.weight / self.weight.norm(), self.shift, padding=self.padding)


class ActivatedConv2d(StandardisedConv2d):
    """Calls a module of its own after the convolution."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.activation = nn.Tanh()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.activation(super().forward(input))


class DoubledConv2d(StandardisedConv2d):
    """Calls a module of its own before the convolution."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.scale = nn.Hardtanh()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(self.scale(input))


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.fc = nets.conv(3, 6), layer, nn.Linear(8, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


def captured(layer: nn.Module) -> tuple[Captured, nn.Module]:
    net = nets.drawn(lambda: Net(layer))
    return capture(net, nets.images(1)), net


def same(found: Captured, net: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found.module(nets.images()), net(nets.images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        StandardisedConv2d(6, 8, 3, padding=1),
        StandardisedConv2d(6, 8, 3, padding=1, bias=False),
        StandardisedConv2d(6, 8, 3, stride=2, groups=2, dilation=2),
        SamePaddedConv2d(6, 8, 3, 2),
    ],
)
def test_a_weight_computed_from_parameters_is_folded(layer: nn.Conv2d) -> None:
    found, net = captured(layer)
    assert f"b: {type(layer).__name__} folded into an ordinary convolution" in found.notes
    same(found, net)


@pytest.mark.parametrize(
    "layer",
    [
        StandardisedConv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        StandardisedConv2d(6, 8, 3, padding=1, padding_mode="circular"),
        StandardisedConv2d(6, 8, 3, padding=1, padding_mode="replicate"),
        OneFilledConv2d(6, 8, 3),
        ShiftedConv2d(6, 8, 3, padding=1),
        ActivatedConv2d(6, 8, 3),
        DoubledConv2d(6, 8, 3),
    ],
    ids=["reflect", "circular", "replicate", "ones", "another bias", "module after it", "module before it"],
)
def test_a_convolution_that_does_more_than_an_ordinary_one_stays(layer: nn.Conv2d) -> None:
    found, net = captured(layer)
    assert type(found.module.get_submodule("b")) is type(layer)
    same(found, net)
