"""Cuts a dense graph to a candidate's widths, layer by layer; how its operators are stored is the derived class's to say.

Removed residual branches leave their shortcut, operators whose results are no longer used go, and layers are narrowed to their
widths; every activation behind a narrowed layer gets its new shape, and constants and shape literals follow it. Which channels
stay does not change what a network costs, so the first ones do. See `edit.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from math import prod
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from ...pipeline.errors import BuildError
from ..base import Structure

Array = NDArray[Any]
Shape = tuple[int, ...]
Op = TypeVar("Op")
Tensor = TypeVar("Tensor", int, str)


class Rule(Enum):
    """How the shape of an operator's result follows from those of its operands."""

    LAYER = auto()  # convolution or linear layer with constant weights
    BROADCAST = auto()  # element by element, operands aligned at the last axis
    KEEP = auto()  # same rank; an axis that can change has one size before and after
    REDUCE = auto()  # over the axes in the second operand
    CONCAT = auto()
    TRANSPOSE = auto()
    RESHAPE = auto()
    UNKNOWN = auto()


class Editor(ABC, Generic[Op, Tensor]):
    """The operators of a graph in the order they run, free to be changed, and which of them are named layers."""

    place: str  # where layers are looked for, for messages
    rules: Mapping[str, Rule]  # by the operator's kind
    unlisted: Rule  # of the other kinds
    ops: list[Op]
    layers: dict[str, Op]
    outputs: Sequence[Tensor]
    now: dict[Tensor, Shape]  # activations whose shape has changed

    def cut(self, structure: Structure) -> None:
        """Give the graph a structure; layers that it does not name keep their outputs.

        Raises:
            BuildError: a layer is not there, a removed branch does not end in a sum, the widths contradict each other, or
                channels are removed in front of an operator that cannot follow.
        """
        for name in (*structure.widths, *structure.removed):
            if name not in self.layers:
                raise BuildError(f"layer {name} is not in {self.place}", do="give it a module of its own in the network")
        for name in structure.removed:
            self.bypass(name, *self._sum_after(name))
        self.drop_dead()
        self._narrow(structure)

    @abstractmethod
    def kind(self, op: Op) -> str:
        """The format's name of the operator."""

    def rule(self, op: Op) -> Rule:
        """How the operator's shapes follow each other."""
        return self.rules.get(self.kind(op), self.unlisted)

    @abstractmethod
    def inputs(self, op: Op) -> Sequence[Tensor]:
        """Its operands; omitted ones are left out."""

    @abstractmethod
    def results(self, op: Op) -> Sequence[Tensor]:
        """Its results."""

    @abstractmethod
    def was(self, tensor: Tensor) -> Shape:
        """A tensor's shape in the dense graph, batch 1."""

    @abstractmethod
    def value(self, tensor: Tensor) -> Array | None:
        """A constant's value; None for an activation."""

    @abstractmethod
    def bypass(self, name: str, branch: Tensor, add: Op) -> None:
        """Let what reads a sum read the operand that is not `branch`; `name` is the branch's last layer, for messages."""

    @abstractmethod
    def width(self, op: Op) -> tuple[int, int, int]:
        """A layer's input channels in each group, its output channels and the axis of the channels in its activations."""

    @abstractmethod
    def narrow(self, op: Op, inputs: int, outputs: int) -> None:
        """Cut a layer's constants; `inputs` counts those of all groups."""

    @abstractmethod
    def shorten(self, op: Op, operand: Tensor, sizes: Mapping[int, int]) -> None:
        """Keep the first entries of a constant operand along some axes: axis -> entries."""

    @abstractmethod
    def axis(self, op: Op) -> int:
        """The axis of a concatenation."""

    @abstractmethod
    def order(self, op: Op) -> Sequence[int] | None:
        """The axes of a transposition; None if they are computed."""

    @abstractmethod
    def write_shape(self, op: Op, shape: Shape) -> None:
        """Change the literal sizes of a reshape."""

    def shape(self, tensor: Tensor) -> Shape:
        """A tensor's shape as far as the graph has been cut."""
        return self.now[tensor] if tensor in self.now else self.was(tensor)

    def _sum_after(self, name: str) -> tuple[Tensor, Op]:
        """The operand that comes from a layer and the sum that adds it to something else."""
        derived = set(self.results(self.layers[name]))
        for op in self.ops:
            mine = [i for i in self.inputs(op) if i in derived]
            if not mine:
                continue
            if self.kind(op).upper() == "ADD" and len(mine) == 1 and all(self.value(i) is None for i in self.inputs(op)):
                return mine[0], op
            if self.rule(op) in (Rule.LAYER, Rule.CONCAT):
                break
            derived.update(self.results(op))
        raise BuildError(f"the branch that ends in {name} cannot be removed", found="no sum after it", expected="a shortcut")

    def drop_dead(self) -> None:
        """Remove operators whose results are unused."""
        wanted, kept = set(self.outputs), []
        for op in reversed(self.ops):
            if wanted.intersection(self.results(op)):
                kept.append(op)
                wanted.update(self.inputs(op))
        self.ops = kept[::-1]

    def _narrow(self, structure: Structure) -> None:
        names = {id(op): name for name, op in self.layers.items()}
        first = next(iter(self.layers), "")
        for op in self.ops:
            if self.rule(op) is Rule.LAYER:
                name = names.get(id(op), "")
                self._narrow_layer(op, name, structure.widths.get(name), padded=name == first)
            elif any(i in self.now for i in self.inputs(op)):
                for out in self.results(op):
                    after = self._shape_after(op, out)
                    if after is None:
                        raise BuildError(
                            f"channels cannot be removed in front of the operator {self.kind(op)}", do="use --pattern weight"
                        )
                    self._now(out, after)

    def _now(self, tensor: Tensor, shape: Shape) -> None:
        if shape != self.was(tensor):
            self.now[tensor] = shape

    def _narrow_layer(self, op: Op, name: str, widths: tuple[int, int] | None, *, padded: bool) -> None:
        data, out = self.inputs(op)[0], self.results(op)[0]
        each, dense, axis = self.width(op)
        before, channels = self.was(data)[axis], self.shape(data)[axis]
        if widths is None and channels == before:
            return
        inputs, outputs = widths or (before, dense)
        if each == 1 and before > 1:  # depthwise
            inputs = channels
            outputs = outputs if widths else dense * channels // before
        elif inputs != channels and not (padded and channels == before):  # the image may have been given more channels
            found = f"{inputs} inputs of {channels} channels"
            raise BuildError(f"layer {name or self.kind(op)} of a candidate", found=found, expected="as many")
        self.narrow(op, channels, outputs)
        self._now(out, _with(self.was(out), axis, outputs))

    def _shape_after(self, op: Op, out: Tensor) -> Shape | None:
        """New shape of a result some of whose operands have changed; None if it is unknown."""
        rule, result, operands = self.rule(op), self.was(out), self.inputs(op)
        before, after = self.was(operands[0]), self.shape(operands[0])
        if rule is Rule.RESHAPE:
            shape = reshaped(before, result, after)
            if shape is not None:
                self.write_shape(op, shape)
            return shape
        if rule is Rule.CONCAT:
            axis = self.axis(op) % len(result)
            return _with(after, axis, sum(self.shape(i)[axis] for i in operands))
        if rule is Rule.TRANSPOSE:
            order = self.order(op)
            return None if order is None else tuple(after[i] for i in order)
        if rule is Rule.BROADCAST:
            return self._broadcast(op, result)
        if rule is Rule.REDUCE and len(result) < len(before):
            axes = self.value(operands[1]) if len(operands) > 1 else None
            gone = set() if axes is None else {int(i) % len(before) for i in axes.ravel()}
            left = tuple(n for i, n in enumerate(after) if i not in gone)
            return left if len(left) == len(result) else None
        if rule is Rule.UNKNOWN or len(result) != len(before):
            return None
        changed = {i: n for i, n in enumerate(after) if n != before[i]}
        if any(result[i] != before[i] for i in changed):
            return None
        return tuple(changed.get(i, n) for i, n in enumerate(result))

    def _broadcast(self, op: Op, was: Shape) -> Shape | None:
        """The common shape of changed operands; constants are cut to it."""
        sizes: dict[int, set[int]] = {}  # axis, from the end -> sizes of the activations along it
        for operand in self.inputs(op):
            if self.value(operand) is None:
                for i, (n, now) in enumerate(zip(self.was(operand)[::-1], self.shape(operand)[::-1], strict=True)):
                    if n == was[-1 - i] and n > 1:
                        sizes.setdefault(i, set()).add(now)
                    elif n != now:
                        return None
        if any(len(found) > 1 for found in sizes.values()):
            return None
        shape = tuple(sizes.get(i, {n}).pop() for i, n in reversed(list(enumerate(was[::-1]))))
        for operand in self.inputs(op):
            if self.value(operand) is not None:
                own = self.was(operand)
                aligned = range(len(was) - len(own), len(was))
                cut = {i: shape[at] for i, at in enumerate(aligned) if own[i] == was[at] != shape[at]}
                if cut:
                    self.shorten(op, operand, cut)
        return shape


def reshaped(before: Shape, target: Shape, now: Shape) -> Shape | None:
    """The target of a reshape whose operand has changed from `before` to `now`; None if no target keeps the axes apart.

    Axes that are merged or split are found as the shortest runs with equal products. Where a changed axis is split, the largest
    part follows: the others are a number of groups or of heads.
    """
    result: list[int] = []
    for ins, outs in _runs(before, target):
        old, new = prod(before[ins]), prod(now[ins])
        sizes = list(target[outs])
        if old != new:
            follow = [i for i in range(len(sizes)) if sizes[i] * new % old == 0]
            if not follow:
                return None
            largest = max(follow, key=lambda i: (sizes[i], i))
            sizes[largest] = sizes[largest] * new // old
        result += sizes
    return tuple(result)


def _runs(before: Shape, target: Shape) -> Iterator[tuple[slice, slice]]:
    """The shortest runs of axes of two shapes with the same number of elements that hold the same elements."""
    i = j = 0
    while i < len(before) and j < len(target):
        start, begin = i, j
        i, j = i + 1, j + 1
        while prod(before[start:i]) != prod(target[begin:j]):
            if prod(before[start:i]) < prod(target[begin:j]):
                i += 1
            else:
                j += 1
        yield slice(start, i), slice(begin, j)
    yield slice(i, len(before)), slice(j, len(target))  # axes of size one


def _with(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis:][1:])
