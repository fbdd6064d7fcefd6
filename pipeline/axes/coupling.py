"""Groups of units and residual blocks of a captured network: what can be removed, and what keeps the rest.

`couple` is decided once; every other room reads membership from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from . import rules
from .algebra import Axis, size_of
from .blocks import residual_blocks
from .capture import Captured, operator_name, owner
from .resolve import Resolved, resolve
from .types import Block, Group, Locked, Slice, Unit
from .walk import Cost, Walk

assert rules.__all__  # importing the rules registers them

Plan = Mapping[str, Iterable[int]]  # group -> units that go; a residual block that goes has one unit, 0


@dataclass(frozen=True)
class Coupling:
    """All that can be removed from a captured network."""

    walk: Walk
    resolved: Resolved
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    primes: Mapping[str, tuple[int, ...]]  # group -> the prime component of each of its units
    locked_groups: Mapping[str, str] = field(default_factory=dict)  # group -> why it stays, found by the gate
    locked_blocks: Mapping[str, str] = field(default_factory=dict)  # residual block -> why it stays

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass on the example."""
        return sum(c.macs for c in self.walk.costs)

    def gone(self, plan: Plan) -> NDArray[np.bool_]:
        """Which components go under a plan."""
        size = int(self.resolved.component.max(initial=-1)) + 1
        gone = np.zeros(size, dtype=bool)
        for name in plan.keys() - {b.name for b in self.blocks}:
            gone[[self.primes[name][u] for u in plan[name]]] = True
        for c, parts in self.resolved.primes.items():
            gone[c] = gone[list(parts)].any()
        return gone

    def kept(self, axis: Axis, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which positions of an axis stay."""
        atoms = [
            np.ones(atom.size, dtype=bool) if atom.labels is None else ~gone[self.resolved.component[atom.labels]]
            for atom in axis
        ]
        mask = atoms[0] if atoms else np.ones(1, dtype=bool)
        for own in atoms[1:]:
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
                    found |= self._groups_of_labels(atom.labels)
        return found - self.locked_groups.keys()

    def _groups_of_labels(self, labels: NDArray[np.int64]) -> set[str]:
        components = np.unique(self.resolved.component[labels]).tolist()
        return {self._by_prime[p] for c in components for p in self.resolved.primes.get(c, (c,)) if p in self._by_prime}

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

    def paying_groups(self) -> tuple[Group, ...]:
        """The groups, not locked, whose units make some operator cheaper when they go; rows of a table do not."""
        paying = self.groups_of(axis for cost in self.walk.costs for axis in cost.axes)
        return tuple(g for g in self.groups if g.name in paying)

    def left_out(self, plan: Plan) -> tuple[Block, ...]:
        """The residual blocks that go under a plan."""
        return tuple(b for b in self.blocks if list(plan.get(b.name, ())))

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
        if not cost.axes:
            return "units of a recurrent or bilinear layer are not removed"
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
    table = _table(walk, resolved)
    tags, kinds = _tags(walk, resolved), _kinds(walk, resolved)
    by_signature: dict[tuple[int, bytes], list[int]] = {}
    first = np.ones(len(table.place), dtype=bool)  # of each place of each prime
    first[1:] = table.place[1:] != table.place[:-1]
    first[table.starts[:-1]] = True
    for row, prime in enumerate(table.primes):
        here = slice(table.starts[row], table.starts[row + 1])
        begins = np.flatnonzero(first[here])
        where = table.place[here][begins]
        if (np.diff(begins, append=here.stop - here.start) == table.sizes[where]).any():  # nothing of a parameter would be left
            continue
        by_signature.setdefault((tags.get(int(prime), 0), where.tobytes()), []).append(row)
    groups: list[Group] = []
    primes: dict[str, tuple[int, ...]] = {}
    for (tag, where_bytes), rows in by_signature.items():
        if len(rows) < 2:
            continue
        names = [table.places[k] for k in np.frombuffer(where_bytes, dtype=np.int64)]
        members = [int(table.primes[r]) for r in rows]
        marks = set().union(*(kinds.get(p, set()) for p in members))
        kind = _kind(marks, bool(tag), [(p, axis, len(walk.parameters[p])) for p, axis in names])
        producers = [p for p, axis in names if axis == 0 and p.endswith("weight")] or [names[0][0]]
        base = producers[0].rpartition(".")[0] or producers[0]
        name = base if kind in ("channel", "mlp", "stream") else f"{base}:{kind}"
        if name in primes:
            name = next(f"{name}#{k}" for k in range(2, len(by_signature) + 3) if f"{name}#{k}" not in primes)
        order = sorted(range(len(rows)), key=lambda k: int(table.position[table.starts[rows[k]]]))
        groups.append(Group(name, kind, _Units(table, tuple(rows[k] for k in order))))
        primes[name] = tuple(members[k] for k in order)
    coupling = Coupling(walk, resolved, tuple(groups), (), primes)
    return replace(coupling, blocks=residual_blocks(captured, coupling))


@dataclass(frozen=True)
class _Table:
    """Where every prime that can go has its positions: rows sorted by prime, then place, then position."""

    places: list[tuple[str, int]]  # (parameter, axis)
    sizes: NDArray[np.int64]  # of each place
    primes: NDArray[np.int64]
    starts: NDArray[np.int64]  # of each prime's rows, and the end
    place: NDArray[np.int64]
    position: NDArray[np.int64]


class _Units(Sequence[Unit]):
    """A group's units, made as they are asked for: there are hundreds of thousands in a large network."""

    def __init__(self, table: _Table, rows: tuple[int, ...]) -> None:
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | Sequence[Unit]:
        if isinstance(index, slice):
            return _Units(self._table, self._rows[index])
        table, row = self._table, self._rows[index]
        start, end = int(table.starts[row]), int(table.starts[row + 1])
        found: dict[int, list[int]] = {}
        for k, position in zip(table.place[start:end].tolist(), table.position[start:end].tolist(), strict=True):
            found.setdefault(k, []).append(position)
        return Unit(tuple(Slice(*table.places[k], tuple(at)) for k, at in found.items()))


def _table(walk: Walk, resolved: Resolved) -> _Table:
    used = {n.name for n in walk.captured.graph.nodes if n.op == "placeholder" and n.users}
    used = {walk.captured.names[n] for n in used if n in walk.captured.names}
    size = int(resolved.component.max(initial=-1)) + 1
    stays, several = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    stays[list(resolved.reasons)] = True
    several[list(resolved.primes)] = True
    places: list[tuple[str, int]] = []
    columns: list[tuple[NDArray[np.int64], NDArray[np.int64], int]] = []  # primes, positions, place
    for name, axes in walk.parameters.items():
        if name not in used:
            continue
        for k, axis in enumerate(axes):
            for atom in axis:
                if atom.labels is None:
                    continue
                component = resolved.component[atom.labels]
                plain = np.flatnonzero(~stays[component] & ~several[component])
                columns.append((component[plain], plain, len(places)))
                for at in np.flatnonzero(several[component]).tolist():
                    parts = [p for p in resolved.primes[int(component[at])] if not stays[p]]
                    columns.append((np.array(parts, dtype=np.int64), np.full(len(parts), at), len(places)))
            places.append((name, k))
    empty = np.zeros(0, dtype=np.int64)
    prime = np.concatenate([c[0] for c in columns] or [empty])
    position = np.concatenate([c[1] for c in columns] or [empty])
    place = np.concatenate([np.full(len(c[0]), c[2], dtype=np.int64) for c in columns] or [empty])
    order = np.lexsort((position, place, prime))
    primes, starts = np.unique(prime[order], return_index=True)
    sizes = np.array([size_of(walk.parameters[name][k]) for name, k in places], dtype=np.int64)
    return _Table(places, sizes, primes, np.append(starts, len(prime)), place[order], position[order])


def _tags(walk: Walk, resolved: Resolved) -> dict[int, int]:
    """Which factors of products a prime is of: heads and their dimensions touch the same parameters."""
    factors: dict[int, set[bytes]] = {}
    for product in resolved.products:
        for atom in product.factors:
            if atom.labels is not None:
                components = np.unique(resolved.component[atom.labels])
                factor = components.tobytes()
                for c in components.tolist():
                    factors.setdefault(c, set()).add(factor)
    numbers: dict[frozenset[bytes], int] = {}
    return {prime: numbers.setdefault(frozenset(of), len(numbers) + 1) for prime, of in factors.items()}


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
