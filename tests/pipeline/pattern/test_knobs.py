"""The decisions of a search keep to the target's limits, and a setting of them is a plan."""

from __future__ import annotations

import nets
import pytest
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.pattern.knobs import SHARES, knob_of, knobs_for, plan_for
from edge_compress.pipeline.types import Knob, Plan
from edge_compress.targets.base import Limits
from hypothesis import given, settings
from hypothesis import strategies as st


def limits(multiple: int) -> Limits:
    return Limits(multiple, (Precision.FP32,), (Pattern.CHANNEL,))


@given(size=st.integers(1, 200), multiple=st.sampled_from([1, 2, 4, 8, 16]))
@settings(deadline=None)
def test_knobs_keep_to_the_targets_multiples(size, multiple):
    knob = knob_of("g", "channel", size, limits(multiple))
    if knob is None:
        assert size <= multiple  # there is nothing smaller that the kernels like
        return
    assert knob.kept[0] == knob.size == size
    assert all(count % multiple == 0 and count > 0 for count in knob.kept[1:])
    assert list(knob.kept) == sorted(set(knob.kept), reverse=True)
    assert 1 < len(knob.kept) <= len(SHARES)
    for share in SHARES:  # nothing asked for is further away than rounding to a multiple
        assert min(abs(count - size * share) for count in knob.kept) <= max(multiple / 2, multiple - size * share)


def test_any_number_of_heads_may_stay_and_dimensions_come_in_fours():
    head, dimension = knob_of("a:head", "head", 6, limits(8)), knob_of("a:head_dim", "head_dim", 32, limits(8))
    assert head is not None
    assert dimension is not None
    assert head.kept == (6, 4, 3, 2)
    assert dimension.kept == (32, 24, 16, 8)


def test_a_block_is_there_or_not():
    _, coupling = nets.subject("OptionA")
    knobs = {k.name: k for k in knobs_for(coupling, limits(4))}
    assert knobs["block:layer2.1.conv2"] == Knob("block:layer2.1.conv2", "block", 1, (1, 0))
    assert knobs["layer3.0.conv2"] == Knob("layer3.0.conv2", "stream", 12, (12, 8, 4))
    assert knobs["layer2.1.conv1"].block == "block:layer2.1.conv2"
    assert "conv1" not in knobs  # four channels in steps of four: no choice, no knob


def test_a_plan_keeps_the_highest_scored_units():
    knobs = (Knob("a", "channel", 4, (4, 2, 1)), Knob("b", "stream", 3, (3, 1)), Knob("block:c", "block", 1, (1, 0)))
    order = {"a": (2, 0, 3, 1), "b": (1, 2, 0)}
    plan = plan_for(knobs, (1, 0, 1), order, "hasa")
    assert plan == Plan(Pattern.CHANNEL, "hasa", {"a": (0, 2)}, ("block:c",), {"a": 0.5, "b": 0.0, "block:c": 1.0})
    assert plan_for(knobs, (0, 0, 0), order, "hasa").kept == {}
    assert plan_for(knobs, (2, 1, 0), order, "hasa").kept == {"a": (2,), "b": (1,)}
    with pytest.raises(ValueError, match="zip"):
        plan_for(knobs, (0, 0), order, "hasa")
