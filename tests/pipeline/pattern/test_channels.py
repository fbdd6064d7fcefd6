"""What the ways to prune say of a network."""

import pytest
from edge_compress.pipeline.graph.trace import canonical
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.pattern.channels import Channels
from edge_compress.pipeline.types import Plan
from edge_compress.targets.base import Limits
from nets import SHAPE, OptionA, drawn


def test_layers_in_the_place_of_zero_padding_are_no_weights_that_came_back():
    dense = drawn(OptionA)
    way = Channels(canonical(dense, SHAPE), SHAPE, Limits(1, (Precision.FP32,), (Pattern.CHANNEL,)), "magnitude", 0)
    assert sum(p.numel() for p in way.net.parameters()) > sum(p.numel() for p in dense.parameters())
    assert way.sparsity(dense, way.net) == 0.0
    inner = next(g for g in way.coupling.groups if g.kind == "inner")
    plan = Plan(Pattern.CHANNEL, "", {inner.name: tuple(range(inner.size // 2))})
    gone = sum(p.numel() for p in way.net.parameters()) - sum(p.numel() for p in way.blank(plan).parameters())
    assert way.sparsity(dense, way.blank(plan)) == pytest.approx(gone / sum(p.numel() for p in dense.parameters()))
