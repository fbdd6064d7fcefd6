"""What is refused is refused in one line that names the place; what is folded is said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.capture import _place, capture
from edge_compress.pipeline.axes.inspect import inspect
from edge_compress.pipeline.errors import InputError
from networks import NETWORKS
from torch import nn

X = torch.randn(1, 1, 8, 8)


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x + 1
        return self.a(x)


class Rolling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.a(x), 0.5)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(1, 8, 3), nn.Conv2d(2, 8, 3), nn.Linear(8, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor]:
        both = self.a(left) + self.b(right)
        return [both.mean((2, 3)).relu() @ self.f.weight.t(), self.f(both.amax((2, 3)))]


class Careful(nn.Module):
    """A layer between two others under another mode: of autocast, or of gradients."""

    def __init__(self, mode: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.mode = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        with self.mode():
            x, y = self.b(x).relu().float().chunk(2, 1)
            with torch.no_grad():
                x = x * 2
        return self.c(torch.cat([x, y], 1)).mean((2, 3))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (self.a(x),))


def message(module: object, example: object = X) -> str:
    with pytest.raises(InputError) as caught:
        capture(module, example)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_control_flow_on_data_names_its_line() -> None:
    text = message(Deciding())
    assert "values of its input" in text
    assert "if x.sum() > 0" in text


@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu", enabled=False), torch.enable_grad, torch.no_grad], ids=["autocast", "grad", "no_grad"]
)
def test_modes_in_forward_are_no_boundary(mode: Callable[[], AbstractContextManager[object]]) -> None:
    found = inspect(Careful(mode), X)
    assert {group.name: group.units for group in found.groups} == {"a": 8, "b": 4}
    assert found.equivalence.passed


def test_what_makes_values_half_precise_or_is_a_graph_of_its_own_is_named() -> None:
    assert "torch.autocast enabled in forward" in message(Careful(lambda: torch.autocast("cpu", torch.bfloat16)))
    assert "found cond in forward" in message(Branching())


def test_dropout_that_is_always_on() -> None:
    assert "dropout in forward, active in eval mode" in message(Rolling())


def test_meta_and_scripted() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(1, 4, 3))
    assert "found 0.weight, a tensor on the meta device" in message(net)
    assert "expected a torch.nn.Module" in message(torch.jit.trace(nn.ReLU(), X))


def test_wrong_inputs_are_the_users() -> None:
    assert "does not run on the example inputs" in message(NETWORKS["plain"](), torch.randn(1, 3, 8, 8))
    assert "example inputs" in message(NETWORKS["plain"](), 3)


def test_wrappers_are_taken_off() -> None:
    found = inspect(nn.DataParallel(NETWORKS["plain"]()), X)
    assert found.prunable_macs_share == 1.0
    assert found.notes == ("DataParallel was unwrapped",)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("weight_norm_parametrised", "c: _WeightNorm folded into weight"),
        ("spectral_norm_parametrised", "c: _SpectralNorm folded into weight"),
        ("old_weight_norm", "b: WeightNorm folded into weight"),
        ("pruning_mask", "b: pruning mask folded into weight"),
    ],
)
def test_computed_weights_are_folded_and_said(name: str, note: str) -> None:
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    expected = net(X)
    captured = capture(net, X)
    assert captured.notes == (note,)
    torch.testing.assert_close(captured.module(X), expected)


@pytest.mark.parametrize("example", [(X, torch.randn(1, 2, 8, 8)), {"left": X, "right": torch.randn(1, 2, 8, 8)}])
def test_several_inputs_and_outputs(example: object) -> None:
    found = inspect(Several(), example)
    assert found.equivalence.passed
    assert [(g.name, g.kind) for g in found.groups] == [("a", "stream")]


def test_the_place_is_named_in_packages_whose_names_begin_with_torch_too() -> None:
    beside = f"{Path(torch.__file__).parent}vision/ops/boxes.py"
    with pytest.raises(ValueError, match="of its own") as caught:
        exec(compile("raise ValueError('of its own')", beside, "exec"))
    assert _place(caught.value).startswith("boxes.py:1: ")
