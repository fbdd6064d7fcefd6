"""What passed the gate is cut right under any plan, not under the gate's own alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from edge_compress.pipeline.axes.capture import run
from edge_compress.pipeline.axes.cutting.comparison import TOLERANCE, relative_difference
from edge_compress.pipeline.axes.cutting.gate import Checked, enlivened
from edge_compress.pipeline.axes.cutting.surgery import cut, zeroed
from networks import NETWORKS
from small_transformers import TRANSFORMERS
from torch import Tensor, nn

from tests.support.nets import checked_of

ALL = {**NETWORKS, **{f"transformer_{k}": v for k, v in TRANSFORMERS.items()}}


def differences(found: Checked, plans: int = 4) -> list[float]:
    """Of cut and zeroed, under random plans and under one of each group alone."""
    groups = found.coupling.open_groups()
    drawn = random.Random(0)
    sizes = {g.name: len(g.units) for g in groups}
    tried = [{g: sorted(drawn.sample(range(n), drawn.randint(1, n - 1))) for g, n in sizes.items()} for _ in range(plans)]
    tried += [{g: list(range(n // 3 + 1, n))} for g, n in sizes.items()]
    captured, results = found.coupling.walk.captured, []
    with enlivened(captured.module):
        for plan in tried:
            small = run(cut(found.coupling, plan, found.sized).eval(), captured.example)
            results.append(relative_difference(small, run(zeroed(found.coupling, plan), captured.example, in_steps=True)))
    return results


@pytest.mark.parametrize("name", ALL)
def test_any_plan_of_a_small_network_is_cut_as_it_is_zeroed(name: str) -> None:
    torch.manual_seed(0)
    assert max(differences(checked_of(ALL[name](), (1, 8, 8))), default=0.0) <= TOLERANCE


class Between(nn.Module):
    """Convolution a, something that its channels pass through, convolution b."""

    def __init__(self, between: Callable[[Tensor], Tensor], outs: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(outs, 16, 3, padding=1)
        self.between, self.fc = between, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.fc(torch.relu(self.b(self.between(self.a(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def halves(y: Tensor) -> Tensor:
    h = y.shape[1] // 2
    return torch.cat([y[:, :h].relu(), y[:, h:].tanh()], 1)


def halves_by_sizes(y: Tensor) -> Tensor:
    c, h = y.shape[1], y.shape[1] // 2
    a, b = y.split([h, c - h], 1)
    return torch.cat([a.relu(), b.tanh()], 1)


def halves_by_literals(y: Tensor) -> Tensor:
    return torch.cat([y[:, :8].relu(), y[..., 8:, :, :].tanh(), y.narrow(1, 4, 4)], 1)


def shifted_in_time(y: Tensor) -> Tensor:
    fold, y = y.shape[1] // 4, torch.stack([y, 2 * y, 3 * y], 1)
    out = torch.zeros_like(y)
    out[:, :-1, :fold] = y[:, 1:, :fold]
    out[:, 1:, fold:] = y[:, :-1, fold:]
    return out.mean(1)


def first_scaled(y: Tensor) -> Tensor:
    y[:, 0] *= 3.0
    return y


def first_overwritten(y: Tensor) -> Tensor:
    y[:, 0] = 0.0
    return y.relu()


@pytest.mark.parametrize(
    ("between", "outs", "open_"),
    [
        (halves, 16, True),
        (halves_by_sizes, 16, True),
        (halves_by_literals, 20, True),
        (lambda y: y.relu()[:, : y.shape[1] // 2], 8, True),
        (lambda y: y[:, 1::2], 8, True),
        (lambda y: y[:, :8:2], 4, False),
        (lambda y: y[:, 3::2], 7, False),
        (shifted_in_time, 16, False),
        (first_scaled, 16, False),
        (first_overwritten, 16, False),
    ],
)
def test_channels_read_by_their_place_are_cut_right_or_stay(between: Callable[[Tensor], Tensor], outs: int, open_: bool) -> None:
    torch.manual_seed(0)
    found = checked_of(Between(between, outs), (3, 8, 8))
    assert any(g.name.startswith("a") for g in found.coupling.open_groups()) == open_
    assert max(differences(found)) <= TOLERANCE


class Nested(nn.Module):
    """Channels as 2 x 12 in attention over channels, and as 6 x 4 in a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1, groups=6)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y = self.a(x)
        z = y.flatten(2).unflatten(1, (2, -1))
        return self.fc(self.g(((z @ z.mT).softmax(-1) @ z).reshape(y.shape)).mean((2, 3)))  # type: ignore[no-any-return]


def test_units_of_nested_factors_are_of_one_size() -> None:
    torch.manual_seed(0)
    found = checked_of(Nested(), (3, 8, 8))
    for group in found.coupling.open_groups():
        assert len({sum(len(s.indices) for s in unit.slices) for unit in group.units}) == 1
    assert max(differences(found), default=0.0) <= TOLERANCE


class Masked(nn.Module):
    """A fault that only small logits show, beside a mask's large constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, two of them masked."""
        y = self.a(x)
        y = torch.relu(y * y.shape[1]).mean((2, 3))
        return self.fc(y).masked_fill(torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool), -1e4)  # type: ignore[no-any-return]


def test_a_masks_constant_does_not_hide_a_fault() -> None:
    torch.manual_seed(0)
    assert "a" in checked_of(Masked(), (3, 8, 8)).coupling.locked_groups


class Flat(nn.Module):
    """Five like convolutions, the first of them read in a way that is at fault."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 16, 3, padding=1)
        self.c2, self.c3, self.c4 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y = self.c1(x)
        y = torch.relu(y * y.shape[1])
        for conv in (self.c2, self.c3, self.c4):
            y = torch.relu(conv(y))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def test_a_fault_of_one_layer_does_not_lock_those_like_it() -> None:
    torch.manual_seed(0)
    assert set(checked_of(Flat(), (3, 8, 8)).coupling.locked_groups) == {"c1"}
