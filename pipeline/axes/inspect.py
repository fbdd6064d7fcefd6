"""What can be pruned of a network, what is locked and why, and the proof that cutting is zeroing."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .capture import capture
from .coupling import Coupling, couple
from .cutting.gate import Checked, check


@dataclass(frozen=True)
class GroupShare:
    """A group and the share of the network's multiply-accumulates in operators it makes cheaper."""

    name: str
    kind: str
    units: int
    macs_share: float


@dataclass(frozen=True)
class LockedShare:
    """Operators that stay as they are, and why."""

    operation: str
    module: str
    reason: str
    macs_share: float


@dataclass(frozen=True)
class Equivalence:
    """Cut against zeroed, half of the units of every group at once."""

    tried: bool
    largest_relative_difference: float | None
    passed: bool


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; its JSON is the public one."""

    model: str
    captured: str
    parameters: int
    macs: int
    prunable_macs_share: float
    groups: tuple[GroupShare, ...]
    locked: tuple[LockedShare, ...]
    equivalence: Equivalence
    seconds: float
    notes: tuple[str, ...] = ()
    checked: Checked | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        plain = asdict(Inspection(**{**self.__dict__, "checked": None}))
        del plain["checked"]
        result: dict[str, Any] = json.loads(json.dumps(plain))
        return result


def inspect(module: nn.Module, example_inputs: Any, name: str = "", gate: bool = True) -> Inspection:
    """What can be removed from a network; the module is left as it is.

    Args:
        module: the network, with any weights.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        name: what the network is called in the result; its class without one.
        gate: whether to prove that cutting is zeroing.

    Raises:
        InputError: the network cannot be analysed; one line says why.
    """
    start = time.perf_counter()
    captured = capture(module, example_inputs)
    coupling = couple(captured)
    checked = check(coupling) if gate else Checked(coupling, {}, None, False)
    coupling = checked.coupling
    total = max(coupling.macs, 1)
    shares: dict[str, int] = {}
    prunable = 0
    for cost in coupling.walk.costs:
        groups = coupling.groups_of(cost.axes)
        prunable += cost.macs if groups else 0
        for group in groups:
            shares[group] = shares.get(group, 0) + cost.macs
    return Inspection(
        model=name or type(module).__name__,
        captured="export",
        parameters=sum(p.numel() for p in captured.module.parameters()),
        macs=coupling.macs,
        prunable_macs_share=prunable / total,
        groups=tuple(GroupShare(g.name, g.kind, len(g.units), shares.get(g.name, 0) / total) for g in coupling.paying_groups()),
        locked=tuple(LockedShare(x.operation, x.module, x.reason, x.macs / total) for x in coupling.locked()),
        equivalence=Equivalence(checked.difference is not None, checked.difference, checked.passed),
        seconds=time.perf_counter() - start,
        notes=captured.notes,
        checked=checked,
    )


__all__ = ["Coupling", "Equivalence", "GroupShare", "Inspection", "LockedShare", "inspect"]
