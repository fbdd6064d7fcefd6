"""Zero padding of channels becomes a convolution that selects, computes the same, and other padding stays as it is."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.capture import Captured, capture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

WHOLE = slice(None)


class Padded(nn.Module):
    """A convolution whose channels are padded in the network's own `forward`."""

    def __init__(self, pad: tuple[int, ...], step: int = 1, subsample: Any = None, **how: Any) -> None:
        super().__init__()
        self.conv, self.pad, self.how = nets.conv(3, 4), pad, how
        self.index = subsample or (WHOLE, WHOLE, slice(None, None, step), slice(None, None, step))
        self.fc = nn.Linear(4 + sum(pad[4:]), nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.pad(self.conv(x)[self.index], self.pad, **self.how).mean((2, 3)))


class OfTheInput(nn.Module):
    """Pads channels in a `forward` that looks at values: torch.fx cannot trace it, torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nets.conv(3, 8), nets.conv(8, 8)
        self.fc = nn.Linear(12, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x).relu())
        return self.fc(F.pad(x, (0, 0, 0, 0, int(x.shape[1]) // 4, 2)).mean((2, 3)))


def captured(module: nn.Module) -> Captured:
    return capture(module, nets.images(1))


def inserted(found: Captured) -> dict[str, nn.Conv2d]:
    return {n: m for n, m in found.module.named_modules() if isinstance(m, nn.Conv2d) and "shortcut_" in n}


def same(found: Captured, module: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found.module(nets.images()), module(nets.images()), rtol=1e-5, atol=1e-6)


def test_zero_padded_shortcuts_become_convolutions_that_select() -> None:
    module = nets.drawn(nets.OptionA)
    found = captured(module)
    first, second = (inserted(found)[f"layer{k}.0.shortcut_0"] for k in (2, 3))
    assert (first.in_channels, first.out_channels, first.stride, first.bias) == (4, 8, (2, 2), None)
    assert (second.in_channels, second.out_channels, second.stride, second.bias) == (8, 12, (2, 2), None)
    expected = torch.zeros(8, 4, 1, 1)
    for channel in range(4):
        expected[channel + 2, channel] = 1.0
    assert torch.equal(first.weight, expected)
    assert first.weight.requires_grad  # the selection is where training starts from
    assert not first.training
    assert [note for note in found.notes if "1x1 convolution" in note] == [
        f"layer{k}.0: zero padding of channels as a 1x1 convolution" for k in (2, 3)
    ]
    assert not any("pad" in str(node.target) for node in found.graph.nodes if node.op == "call_function")
    same(found, module)


@given(
    front=st.integers(0, 3),
    back=st.integers(0, 3),
    step=st.integers(1, 3),
    value=st.sampled_from([None, 0.0]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=10)
def test_any_padding_of_channels_is_selected_the_same(front: int, back: int, step: int, value: float | None, seed: int) -> None:
    module = nets.drawn(lambda: Padded((0, 0, 0, 0, front, back), step, value=value), seed)
    found = captured(module)
    assert len(inserted(found)) == (front + back > 0 or bool(inserted(found)))  # padding by nothing may vanish in the export
    same(found, module)


@pytest.mark.parametrize(
    ("pad", "how"),
    [
        ((1, 1, 0, 0, 1, 1), {}),  # of the map as well
        ((0, 0, 0, 0, 1, 1), {"value": 0.5}),  # not zeros
        ((0, 0, 0, 0, -1, 1), {}),  # cuts a channel away
    ],
)
def test_other_padding_stays_as_it_is(pad: tuple[int, ...], how: dict[str, Any]) -> None:
    module = nets.drawn(lambda: Padded(pad, **how))
    found = captured(module)
    assert not inserted(found)
    same(found, module)


@pytest.mark.parametrize(
    "index",
    [
        (WHOLE, WHOLE, slice(1, None, 2), slice(1, None, 2)),
        (WHOLE, WHOLE, slice(None, None, 2), WHOLE),
        (WHOLE, WHOLE, slice(None, 4, 2), slice(None, 4, 2)),
    ],
)
def test_only_plain_subsampling_becomes_a_stride(index: Any) -> None:
    module = nets.drawn(lambda: Padded((0, 0, 0, 0, 1, 1), subsample=index))
    found = captured(module)
    assert [m.stride for m in inserted(found).values()] == [(1, 1)]
    same(found, module)


def test_padding_that_cannot_be_traced_stays() -> None:
    module = nets.drawn(OfTheInput)
    found = captured(module)
    assert not inserted(found)
    assert type(found.module) is OfTheInput
    same(found, module)


class Overwriting(nn.Module):
    """Overwrites what it is given before it pads it, so that the shortcut reads what the branch left."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nets.conv(4, 8), nn.ReLU(inplace=True), nn.Linear(8, nets.CLASSES)
        self.stem = nets.conv(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        self.relu(x)
        return self.fc((self.conv(x) + F.pad(x, (0, 0, 0, 0, 2, 2))).mean((2, 3)))


class Dropping(Padded):
    """Drops as a function, in training only: one trace holds one of the two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Asked(nn.Module):
    """Reads an attribute of the block that pads."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.stem = nets.PaddedBlock(4, 8, 2), nets.conv(3, 4)
        self.fc = nn.Linear(8, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)) * self.block.stride)


def test_a_forward_that_overwrites_its_tensors_still_does() -> None:
    module = nets.drawn(Overwriting)
    same(captured(module), module)


def test_dropout_as_a_function_is_still_there_in_training() -> None:
    module = nets.drawn(lambda: Dropping((0, 0, 0, 0, 1, 1)))
    found = captured(module)
    assert not inserted(found)
    found.module.train()
    one, other = (found.module(nets.images()) for _ in range(2))
    assert not torch.equal(one, other)


def test_a_block_that_its_parent_asks_for_attributes_still_has_them() -> None:
    module = nets.drawn(Asked)
    same(captured(module), module)
