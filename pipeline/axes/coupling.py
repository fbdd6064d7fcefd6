"""Groups of units and residual blocks of a captured network: what can be removed, and what keeps the rest.

`couple` is decided once; every other room reads membership from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from . import rules
from .algebra import Axis
from .blocks import residual_blocks
from .capture import Captured, operator_name, owner
from .resolve import Resolved, resolve
from .types import Block, Group, Locked, Slice, Unit
from .walk import Cost, Walk

assert rules.__all__  # importing the rules registers them

Plan = Mapping[str, Iterable[int]]  # group -> units that go


@dataclass(frozen=True)
class Coupling:
    """All that can be removed from a captured network."""

    walk: Walk
    resolved: Resolved
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    primes: Mapping[str, tuple[int, ...]]  # group -> the prime component of each of its units
    locked_groups: Mapping[str, str] = field(default_factory=dict)  # group -> why it stays, found by the gate

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass on the example."""
        return sum(c.macs for c in self.walk.costs)

    def gone(self, plan: Plan) -> NDArray[np.bool_]:
        """Which components go under a plan."""
        size = int(self.resolved.component.max(initial=-1)) + 1
        gone = np.zeros(size, dtype=bool)
        for name, units in plan.items():
            gone[[self.primes[name][u] for u in units]] = True
        for c, parts in self.resolved.primes.items():
            gone[c] = gone[list(parts)].any()
        return gone

    def kept(self, axis: Axis, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which positions of an axis stay."""
        mask = np.ones(1, dtype=bool)
        for atom in axis:
            if atom.labels is None:
                own = np.ones(atom.size, dtype=bool)
            else:
                own = ~gone[self.resolved.component[atom.labels]]
            mask = (mask[:, None] & own[None, :]).reshape(-1)
        return mask

    def prunable(self, cost: Cost) -> bool:
        """Whether an operator gets cheaper when units of some group that is not locked go."""
        return bool(self.groups_of(cost.axes))

    def groups_of(self, axes: Iterable[Axis]) -> set[str]:
        """The groups, not locked, that have units along any of some axes."""
        found: set[str] = set()
        for axis in axes:
            for atom in axis:
                if atom.labels is not None:
                    for c in np.unique(self.resolved.component[atom.labels]):
                        for p in self.resolved.primes.get(int(c), (int(c),)):
                            name = self._by_prime.get(p)
                            if name is not None and name not in self.locked_groups:
                                found.add(name)
        return found

    @property
    def _by_prime(self) -> dict[int, str]:
        cached: dict[int, str] | None = self.__dict__.get("_cache")
        if cached is None:
            cached = {p: name for name, primes in self.primes.items() for p in primes}
            object.__setattr__(self, "_cache", cached)
        return cached

    def open_groups(self) -> tuple[Group, ...]:
        """The groups that are not locked."""
        return tuple(g for g in self.groups if g.name not in self.locked_groups)

    def lock(self, reasons: Mapping[str, str]) -> Coupling:
        """The same coupling with more groups locked."""
        return replace(self, locked_groups={**self.locked_groups, **reasons})

    def locked(self) -> list[Locked]:
        """Operators that stay as expensive as they are, with their reasons, most expensive first."""
        found: dict[tuple[str, str, str], int] = {}
        for cost in self.walk.costs:
            if cost.macs and not self.prunable(cost):
                key = (operator_name(cost.node), owner(cost.node)[0], self._reason(cost))
                found[key] = found.get(key, 0) + cost.macs
        return sorted((Locked(*key, macs) for key, macs in found.items()), key=lambda x: -x.macs)

    def _reason(self, cost: Cost) -> str:
        reasons: dict[str, None] = {}
        for axis in cost.axes:
            for atom in axis:
                if atom.labels is None:
                    continue
                for c in np.unique(self.resolved.component[atom.labels])[:1]:
                    why = self.resolved.reasons.get(int(c))
                    for p in self.resolved.primes.get(int(c), (int(c),)):
                        why = why or self.resolved.reasons.get(p) or self.locked_groups.get(self._by_prime.get(p, ""))
                    reasons[why or "one unit only"] = None
        return "; ".join(list(reasons)[:2]) or "input of the network"


def couple(captured: Captured) -> Coupling:
    """Label every axis, resolve the labels, and collect units into groups."""
    walk = Walk(captured).run()
    resolved = resolve(walk.store)
    slices = _slices(walk, resolved)
    tags, kinds = _tags(walk, resolved), _kinds(walk, resolved)
    by_signature: dict[tuple[object, ...], list[int]] = {}
    for prime, where in slices.items():
        signature = (tags.get(prime, 0), tuple(where))
        by_signature.setdefault(signature, []).append(prime)
    order = {name: k for k, name in enumerate(walk.parameters)}
    groups: list[Group] = []
    primes: dict[str, tuple[int, ...]] = {}
    for (tag, where), members in by_signature.items():
        if len(members) < 2:
            continue
        names: list[tuple[str, int]] = list(where)  # type: ignore[call-overload]
        marks = set().union(*(kinds.get(p, set()) for p in members))
        kind = _kind(marks, bool(tag), [(p, axis, len(walk.parameters[p])) for p, axis in names])
        producers = [p for p, axis in names if axis == 0 and p.endswith("weight")] or [names[0][0]]
        base = producers[0].rpartition(".")[0] or producers[0]
        name = base if kind in ("channel", "mlp", "stream") else f"{base}:{kind}"
        if name in primes:
            name = next(f"{name}#{k}" for k in range(2, len(by_signature) + 3) if f"{name}#{k}" not in primes)
        members.sort(key=lambda p: slices[p][names[0]][0])
        units = tuple(
            Unit(tuple(Slice(p, axis, tuple(at)) for (p, axis), at in sorted(slices[m].items(), key=lambda x: order[x[0][0]])))
            for m in members
        )
        groups.append(Group(name, kind, units))
        primes[name] = tuple(members)
    coupling = Coupling(walk, resolved, tuple(groups), (), primes)
    return replace(coupling, blocks=residual_blocks(captured, coupling))


def _slices(walk: Walk, resolved: Resolved) -> dict[int, dict[tuple[str, int], list[int]]]:
    """Prime -> (parameter, axis) -> positions, for primes that can go."""
    used = {walk.captured.names[n.name] for n in walk.captured.graph.nodes if n.op == "placeholder" and n.name in walk.captured.names and n.users}
    found: dict[int, dict[tuple[str, int], list[int]]] = {}
    for name, axes in walk.parameters.items():
        if name not in used:
            continue
        for k, axis in enumerate(axes):
            for atom in axis:
                if atom.labels is None:
                    continue
                for position, parts in enumerate(resolved.of(atom.labels)):
                    for prime in parts:
                        if prime not in resolved.reasons:
                            found.setdefault(prime, {}).setdefault((name, k), []).append(position)
    return found


def _tags(walk: Walk, resolved: Resolved) -> dict[int, int]:
    """Which factor of a product a prime is: heads and their dimensions touch the same parameters."""
    tags: dict[int, int] = {}
    for product in resolved.products:
        for k, atom in enumerate(product.factors):
            if atom.labels is not None:
                tags.update(dict.fromkeys((int(c) for c in resolved.component[atom.labels]), k + 1))
    return tags


def _kinds(walk: Walk, resolved: Resolved) -> dict[int, set[str]]:
    kinds: dict[int, set[str]] = {}
    for labels, kind in walk.store.marks:
        for c in np.unique(resolved.component[labels]):
            kinds.setdefault(int(c), set()).add(kind)
    return kinds


def _kind(marks: set[str], factor: bool, names: list[tuple[str, int, int]]) -> str:
    if "head" in marks or (factor and "batch" in marks):
        return "head"
    if "head_dim" in marks or (factor and "summed" in marks):
        return "head_dim"
    if "value_dim" in marks and factor:
        return "value_dim"
    if "group" in marks:
        return "group"
    producers = [p for p, axis, _ in names if axis == 0 and p.endswith("weight")]
    if "sum" in marks and len(producers) > 1:
        return "stream"
    return "channel" if "channel" in marks or any(rank > 2 for _, _, rank in names) else "mlp"
