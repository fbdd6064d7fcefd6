"""What is left after units were removed takes over what they did, as far as least squares can."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from edge_compress.pipeline.axes.capture import capture, tensors_in
from edge_compress.pipeline.axes.coupling import couple
from edge_compress.pipeline.axes.cutting.gate import Checked, check
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.reconstruct.sequential import sequential
from edge_compress.pipeline.reconstruct.stitching import Fitter, stitched
from edge_compress.pipeline.score.layer_moments import LayerMoments
from small_transformers import TRANSFORMERS
from torch import nn

Plan = dict[str, list[int]]
NAMES = ["rms_norm_narrow", "packed", "shared_keys", "torch_attention", "gated_mlp"]


class Mlp(nn.Module):
    """A residual MLP on tokens whose second half of hidden units does what the first half does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc1, self.fc2 = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            self.fc1.weight[12:], self.fc1.bias[12:] = self.fc1.weight[:12], self.fc1.bias[:12]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x[:, 0])
        x = x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


class NormalisedTokens(nn.Module):
    """BatchNorm after linear layers on tokens (n, tokens, channels): its channels are the tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(tokens), nn.Linear(8, 3)
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x[:, 0, : self.tokens])).relu()).mean(1)


@cache
def checked(make: Callable[[], nn.Module]) -> Checked:
    torch.manual_seed(0)
    return check(couple(capture(make().eval(), torch.randn(1, 1, 8, 8))))


def smooth(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator).cumsum(2).cumsum(3) * 0.2


def error(net: nn.Module, dense: nn.Module, inputs: torch.Tensor) -> float:
    with torch.no_grad():
        found, expected = (next(tensors_in(module(inputs))) for module in (net, dense))
        return float((found - expected).norm() / expected.norm())


def every(found: Checked, *kinds: str) -> Plan:
    return {
        g.name: list(range(len(g.units) // 2, len(g.units))) for g in found.coupling.open_groups() if not kinds or g.kind in kinds
    }


def ways(found: Checked, plan: Plan, inputs: torch.Tensor) -> dict[str, nn.Module]:
    fitter = Fitter(LayerMoments(found.coupling.walk.captured.module, inputs))
    return {
        "cut": cut(found.coupling, plan, found.sized),
        "stitched": stitched(found.coupling, plan, found.sized, fitter),
        "sequential": sequential(found.coupling, plan, found.sized, inputs),
    }


@pytest.mark.parametrize("name", NAMES)
def test_with_nothing_removed_nothing_changes(name: str) -> None:
    found = checked(TRANSFORMERS[name])
    for net in ways(found, {}, smooth(50, 1)).values():
        assert error(net, found.coupling.walk.captured.module, smooth(20, 2)) < 1e-5


def test_a_unit_that_another_one_repeats_is_taken_over_whole() -> None:
    found = checked(Mlp)
    (mlp,) = [g.name for g in found.coupling.open_groups() if "fc1" in g.name]
    nets = ways(found, {mlp: list(range(12, 24))}, smooth(200, 1))
    errors = {name: error(net, found.coupling.walk.captured.module, smooth(50, 2)) for name, net in nets.items()}
    assert errors["cut"] > 0.05
    assert errors["stitched"] < 0.01
    assert errors["sequential"] < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_answers_more_like_the_dense_network_than_the_cut_does(name: str) -> None:
    found = checked(TRANSFORMERS[name])
    dense = found.coupling.walk.captured.module
    nets = ways(found, every(found, "mlp"), smooth(200, 1))
    errors = {way: error(net, dense, smooth(100, 2)) for way, net in nets.items()}
    assert errors["stitched"] < 0.9 * errors["cut"]
    assert errors["sequential"] < 0.9 * errors["cut"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_unit_can_be_removed_and_re_fit(name: str) -> None:
    found = checked(TRANSFORMERS[name])
    dense = found.coupling.walk.captured.module
    nets = ways(found, every(found), smooth(100, 1))
    errors = {way: error(net, dense, smooth(50, 2)) for way, net in nets.items()}
    assert errors["sequential"] < errors["cut"]
    assert {type(net).__name__ for net in nets.values()} == {type(dense).__name__}


def test_convolutions_and_their_batchnorm_are_re_fit_together() -> None:
    torch.manual_seed(3)

    def make() -> nn.Module:
        net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        )
        net.train()
        with torch.no_grad():
            for _ in range(20):
                net(smooth(50, 5))
        return net

    found = checked(make)
    nets = ways(found, {found.coupling.open_groups()[0].name: [1, 3, 5]}, smooth(200, 1))
    errors = {way: error(net, found.coupling.walk.captured.module, smooth(100, 2)) for way, net in nets.items()}
    assert errors["sequential"] < 0.7 * errors["cut"]


@pytest.mark.parametrize("tokens", [6, 8])
def test_a_batchnorm_over_tokens_is_none_over_the_channels_of_the_layer_before_it(tokens: int) -> None:
    found = checked(lambda: NormalisedTokens(tokens))
    dense, inputs = found.coupling.walk.captured.module, smooth(200, 1)
    norm = copy.deepcopy(dense.get_submodule("norm").state_dict())
    refit = sequential(found.coupling, {"a": [0, 1]}, found.sized, inputs)
    assert error(refit, dense, inputs) <= error(cut(found.coupling, {"a": [0, 1]}, found.sized), dense, inputs) + 1e-6
    assert all(torch.equal(value, norm[name]) for name, value in refit.get_submodule("norm").state_dict().items())
