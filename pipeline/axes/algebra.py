"""Labels of axes: an axis is a row-major product of atoms, an atom is one label for each of its positions.

Two positions with the same label can only be removed together. Labels are numbers in one store, which records what the operators
say about them: `tie` makes two vectors of labels one, `freeze` keeps labels in the network for a reason, and `split` and `vector`
record that a vector of labels is the product of smaller ones: position (i, j) is gone when i or j is gone. That is how a
channel axis becomes heads x head dimensions and stays the same axis everywhere else. Nothing is resolved here (see `resolve`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Atom:
    """One factor of an axis. Without labels it stays in the network: batch, places, tokens, and what an operator keeps."""

    size: int
    labels: Labels | None = None


Axis = tuple[Atom, ...]  # () has size 1


@dataclass
class Product:
    """`vector[p]` goes when any of its factors' positions goes; p runs over the factors in row-major order."""

    vector: Labels
    factors: tuple[Atom, ...]


def fixed(size: int) -> Axis:
    """An axis of which nothing can be removed."""
    return () if size == 1 else (Atom(size),)


def size_of(axis: Axis) -> int:
    """Number of positions of an axis."""
    return math.prod(atom.size for atom in axis)


def labelled(axis: Axis) -> list[Atom]:
    """The atoms of an axis that carry labels."""
    return [atom for atom in axis if atom.labels is not None]


@dataclass
class Store:
    """All labels of one network, and what is known about them."""

    count: int = 0
    ties: list[tuple[Labels, Labels]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    frozen: list[tuple[Labels, str]] = field(default_factory=list)
    marks: list[tuple[Labels, str]] = field(default_factory=list)
    muted: bool = False  # while an operator is walked whose result no output depends on: its value may change
    _splits: dict[tuple[bytes, int], tuple[Atom, Atom]] = field(default_factory=dict)
    _vectors: dict[tuple[bytes, ...], Atom] = field(default_factory=dict)

    def fresh(self, size: int) -> Axis:
        """An axis with new labels."""
        return () if size == 1 else (self._atom(size),)

    def _atom(self, size: int) -> Atom:
        start = self.count
        self.count += size
        return Atom(size, np.arange(start, start + size))

    def freeze(self, axis: Axis, reason: str) -> None:
        """Keep every position of an axis in the network."""
        if self.muted:
            return
        self.frozen += [(atom.labels, reason) for atom in axis if atom.labels is not None]

    def mark(self, axis: Axis, kind: str) -> None:
        """Say what the units of an axis are."""
        self.marks += [(atom.labels, kind) for atom in axis if atom.labels is not None]

    def split(self, atom: Atom, outer: int) -> tuple[Atom, Atom]:
        """An atom as (outer, inner): the same two atoms whenever the same labels are split the same way."""
        inner = atom.size // outer
        if atom.labels is None:
            return Atom(outer), Atom(inner)
        key = (atom.labels.tobytes(), outer)
        if key not in self._splits:
            pair = self._atom(outer), self._atom(inner)
            self._splits[key] = pair
            self.products.append(Product(atom.labels, pair))
        return self._splits[key]

    def vector(self, axis: Axis) -> Atom:
        """An axis as one atom: what can be cut and joined at single positions."""
        if len(axis) == 1:
            return axis[0]
        size, free = size_of(axis), labelled(axis)
        if not free:
            return Atom(size)
        if len(free) == 1:
            before = math.prod(a.size for a in axis[: axis.index(free[0])])
            after = size // (before * free[0].size)
            assert free[0].labels is not None
            return Atom(size, np.tile(np.repeat(free[0].labels, after), before))
        key = tuple(a.labels.tobytes() if a.labels is not None else str(a.size).encode() for a in axis)
        if key not in self._vectors:
            made = self._atom(size)
            assert made.labels is not None
            self._vectors[key] = made
            self.products.append(Product(made.labels, axis))
        return self._vectors[key]

    def join(self, a: Axis, b: Axis, reason: str) -> Axis:
        """Two axes of one size of which the same positions go; gives the finer of the two."""
        if size_of(a) != size_of(b):
            self.freeze(a, reason)
            self.freeze(b, reason)
            return fixed(max(size_of(a), size_of(b)))
        left, right = list(a), list(b)
        result: list[Atom] = []
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x.size > y.size and x.size % y.size == 0:
                x, rest = self.split(x, y.size)
                left.insert(0, rest)
            elif y.size > x.size and y.size % x.size == 0:
                y, rest = self.split(y, x.size)
                right.insert(0, rest)
            elif x.size != y.size:
                x, y = self.vector((x, *left)), self.vector((y, *right))
                left, right = [], []
            result.append(self._same(x, y, reason))
        return tuple(result)

    def _same(self, x: Atom, y: Atom, reason: str) -> Atom:
        if x.labels is None or y.labels is None:
            self.freeze((x, y), reason)
            return Atom(x.size)
        if x.labels is not y.labels:
            self.ties.append((x.labels, y.labels))
        return x

    def regroup(self, axes: Sequence[Axis], shape: Sequence[int], reason: str) -> list[Axis]:
        """Axes after a reshape to `shape`."""
        queue = [atom for axis in axes for atom in axis]
        result: list[Axis] = []
        for size in shape:
            axis: list[Atom] = []
            while size_of(tuple(axis)) != size:
                need = size // size_of(tuple(axis))
                if not queue or size % size_of(tuple(axis)):
                    return self._broken(axes, shape, reason)
                atom = queue.pop(0)
                if need % atom.size == 0:
                    axis.append(atom)
                elif atom.size % need == 0:
                    outer, inner = self.split(atom, need)
                    axis.append(outer)
                    queue.insert(0, inner)
                else:
                    return self._broken(axes, shape, reason)
            result.append(tuple(axis))
        return result

    def _broken(self, axes: Sequence[Axis], shape: Sequence[int], reason: str) -> list[Axis]:
        for axis in axes:
            self.freeze(axis, reason)
        return [fixed(size) for size in shape]

    def take(self, axis: Axis, positions: Labels) -> Axis:
        """The axis made of some positions of another one."""
        if len(positions) == 1:
            self.freeze(self._at(axis, positions), "read by its number")
            return ()
        inner = size_of(axis[1:])
        if len(axis) > 1 and len(positions) % inner == 0:
            blocks = positions.reshape(-1, inner)
            if (blocks == blocks[:, :1] + np.arange(inner)).all() and not (blocks[:, 0] % inner).any():
                head = self.take(axis[:1], blocks[:, 0] // inner)
                return (*head, *axis[1:])
        return self._at(axis, positions)

    def _at(self, axis: Axis, positions: Labels) -> Axis:
        atom = self.vector(axis)
        return (Atom(len(positions), None if atom.labels is None else atom.labels[positions]),)

    def concatenate(self, axes: Sequence[Axis], reason: str) -> Axis:
        """The axis of a concatenation; parts of which nothing can be removed get labels that stay."""
        tails = {tuple(id(atom.labels) if atom.labels is not None else atom.size for atom in axis[1:]) for axis in axes}
        if len(tails) == 1 and all(
            len(axis) > 1 for axis in axes
        ):  # some heads of each dimension, then others: (heads, dimension)
            return (*self.concatenate([axis[:1] for axis in axes], reason), *axes[0][1:])
        atoms = [self.vector(axis) if axis else Atom(1) for axis in axes]
        if all(atom.labels is None for atom in atoms):
            return fixed(sum(atom.size for atom in atoms))
        parts: list[Labels] = []
        for atom in atoms:
            if atom.labels is None:
                atom = self._atom(atom.size)
                self.freeze((atom,), reason)
            assert atom.labels is not None
            parts.append(atom.labels)
        return (Atom(sum(a.size for a in atoms), np.concatenate(parts)),)
