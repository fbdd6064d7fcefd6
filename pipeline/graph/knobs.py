"""The decisions of a channel search: how many units of each group stay, and the plan of a setting."""

from __future__ import annotations

from collections.abc import Mapping

from ...targets.base import Limits
from ..options import Pattern
from ..types import Knob, Plan
from .coupling import Coupling

SHARES = (1.0, 0.75, 0.5, 0.25)  # of a group's units that may stay, before rounding to what the target's kernels like


def knobs_for(coupling: Coupling, limits: Limits) -> tuple[Knob, ...]:
    """The decisions of the search within the target's limits: every setting of them can be built.

    Kept counts are multiples of `limits.step` (or the dense count). A group with one choice has no knob.
    """
    block_of = {group: block.name for block in coupling.blocks.values() for group in block.groups}
    found = []
    for group in coupling.groups:
        if group.kind == "block":
            kept: tuple[int, ...] = (1, 0)
        else:
            kept = kept_counts(group.size, limits.step(group.size))
        if len(kept) > 1:
            found.append(Knob(group.name, group.kind, group.size, kept, block_of.get(group.name)))
    return tuple(found)


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
