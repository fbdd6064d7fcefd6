"""Knobs of a captured network: what buys no time is not offered, branches are, and the plan of a setting is what is cut."""

from __future__ import annotations

import pytest
import torch
import user_net
from edge_compress.pipeline.errors import UnavailableError
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.search.problem import canonical
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.base import Structure
from edge_compress.targets.jetson import TARGET as JETSON
from edge_compress.targets.x86 import TARGET as X86
from torch import nn

SHAPE = (1, 8, 8)


class Looked(nn.Module):
    """Adds the first of a table's rows to each of eight tokens: the other rows can go, which saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.numbers = nn.Embedding(64, 16), nn.Buffer(torch.arange(8))
        self.stem, self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x[:, 0]) + self.table(self.numbers)
        return self.head((x + self.down(self.up(x).relu())).mean(1))


def units(module: nn.Module) -> Units:
    torch.manual_seed(0)
    return Units(module.eval(), torch.rand(1, *SHAPE), image_signature(SHAPE), X86.limits, "hasa", 0)


def test_rows_of_a_table_are_no_knob() -> None:
    knobs = units(Looked()).knobs
    assert {k.name for k in knobs if k.kind != "block"} <= {"stem", "up"}
    assert [(k.name, k.kept) for k in knobs if k.kind == "block"] == [("block:down", (1, 0))]


class MostlyKept(nn.Module):
    """A wide layer whose channels a softmax compares, and a narrow one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(1, width, 5, padding=2), nn.Conv2d(width, 16, 1)
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.narrow(self.wide(x).softmax(1)).relu()
        return self.head(self.last(x).relu().mean((2, 3)))


def test_what_keeps_most_of_a_network_is_named() -> None:
    way = units(MostlyKept(64))
    share, kept = way.prunable_macs_share, 25 * 64 / (25 * 64 + 16 * 64 + 16 * 16 + 160 / 64)
    assert share == pytest.approx(1 - kept)
    told = way.remarks("onnxruntime")
    assert f"{share:.0%} of the multiply-accumulates are in operators that get cheaper when units are removed." in told
    (named,) = [remark for remark in told if remark.startswith("conv2d in wide keeps")]
    assert named.startswith(f"conv2d in wide keeps {kept:.0%} of them: softmax")


def test_of_a_network_that_can_mostly_be_pruned_no_layer_is_named() -> None:
    way = units(MostlyKept(16))
    assert way.prunable_macs_share > 0.5
    assert not [remark for remark in way.remarks("onnxruntime") if " keeps " in remark]


def test_knobs_inside_a_branch_decide_nothing_once_it_is_gone() -> None:
    way = units(user_net.attending())
    block = next(k for k in way.knobs if k.kind == "block")
    inside = [k.name for k in way.knobs if k.block == block.name]
    assert inside
    levels = canonical(way.knobs, tuple(len(k.kept) - 1 if k.name == block.name or k.name in inside else 0 for k in way.knobs))
    plan = way.plan_for(levels, {k.name: tuple(range(k.size)) for k in way.knobs})
    assert plan.removed_blocks == (block.name,)
    assert not plan.kept
    dense, small = way.net, way.blank(plan)
    assert type(small) is type(dense)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    assert small(torch.randn(5, *SHAPE)).shape == (5, 10)


def test_without_a_board_a_branch_less_is_estimated_to_be_faster() -> None:
    way = units(user_net.attending())
    block = next(k.name for k in way.knobs if k.kind == "block")
    prober = way.prober(JETSON, Precision.FP16, pytest.fail)
    assert prober.estimate(Structure({})) == 1.0
    assert prober.estimate(Structure({}, (block,))) < 0.95
    with pytest.raises(UnavailableError):
        way.prober(X86, Precision.FP32, pytest.fail).estimate(Structure({}))
