"""The decisions of a search over units: how many units of each group stay, and the plan of a setting."""

from __future__ import annotations

from collections.abc import Mapping

from ...targets.base import Limits
from ..axes.coupling import Coupling
from ..options import Pattern
from ..types import Knob, Plan

SHARES = (1.0, 0.75, 0.5, 0.25)  # of a group's units that may stay, before rounding to what the target's kernels like
WHOLE = ("head", "group")  # kinds of which any number may stay; of others a multiple that kernels like
DIMENSIONS = 4  # of queries, keys or values: kept counts are multiples of it


def knobs_for(coupling: Coupling, limits: Limits) -> tuple[Knob, ...]:
    """The decisions of the search within the target's limits: every setting of them can be built.

    A group with one choice has no knob, nor has one whose units make nothing cheaper.
    """
    block_of = {group: block.name for block in coupling.blocks for group in block.groups}
    groups = (knob_of(g.name, g.kind, len(g.units), limits, block_of.get(g.name)) for g in coupling.paying_groups())
    return (*(k for k in groups if k is not None), *(Knob(b.name, "block", 1, (1, 0)) for b in coupling.blocks))


def knob_of(name: str, kind: str, size: int, limits: Limits, block: str | None = None) -> Knob | None:
    """The decision on a group; None where the target's limits leave one choice."""
    kept = kept_counts(size, 1 if kind in WHOLE else DIMENSIONS if kind.endswith("_dim") else limits.step(size))
    return Knob(name, kind, size, kept, block) if len(kept) > 1 else None


def kept_counts(size: int, step: int) -> tuple[int, ...]:
    """How many units of a group may stay: all, and what lies nearest to each share among the multiples of `step`."""
    counts = {max(step, round(size * share / step) * step) for share in SHARES[1:]}
    return size, *sorted((c for c in counts if c < size), reverse=True)


def plan_for(knobs: tuple[Knob, ...], levels: tuple[int, ...], order: Mapping[str, tuple[int, ...]], score: str) -> Plan:
    """The plan of a setting: of each group the highest-scored units stay.

    Args:
        knobs: the decisions.
        levels: one per knob.
        order: group -> its units, highest score first.
        score: name of the score that gave the order, for the record.
    """
    kept, blocks, removed = {}, [], {}
    for knob, level in zip(knobs, levels, strict=True):
        count = knob.kept[level]
        removed[knob.name] = 1.0 - count / knob.size
        if knob.kind == "block":
            blocks += [knob.name] if count == 0 else []
        elif count < knob.size:
            kept[knob.name] = tuple(sorted(order[knob.name][:count]))
    return Plan(Pattern.CHANNEL, score, kept, tuple(blocks), removed)
