"""Reshapes, permutations, splits and concatenations: labels move, nothing is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from ..algebra import Axis, fixed, labelled, size_of
from ..capture import operator_name
from ..walk import Axes, Value, Walk, number, rule


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "_reshape_copy", "view_copy", "ravel")
def reshape(walk: Walk, node: fx.Node) -> Value:
    """Axes are split and merged in row-major order."""
    if not walk.shape(node.args[0]) and walk.shape(node):
        return [fixed(1) for _ in walk.shape(node)]
    return walk.store.regroup(walk.axes(node.args[0]), walk.shape(node), walk.why(node))


@rule("squeeze", "unsqueeze", "atleast_1d", "unsqueeze_copy", "squeeze_copy")
def squeeze(walk: Walk, node: fx.Node) -> Value:
    """Axes of size 1 come and go."""
    return walk.store.regroup(walk.axes(node.args[0]), walk.shape(node), walk.why(node))


@rule("permute", "permute_copy")
def permute(walk: Walk, node: fx.Node) -> Value:
    """Axes in another order."""
    x = walk.axes(node.args[0])
    return [x[number(d)] for d in walk.argument(node, "dims")]


@rule("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "adjoint")
def transpose(walk: Walk, node: fx.Node) -> Value:
    """Two axes change places."""
    x = list(walk.axes(node.args[0]))
    if len(node.args) > 2:
        a, b = number(node.args[1]), number(node.args[2])
    else:
        a, b = -2, -1
    if len(x) > 1:
        x[a], x[b] = x[b], x[a]
    return x


@rule("movedim")
def movedim(walk: Walk, node: fx.Node) -> Value:
    """One axis moves."""
    x = list(walk.axes(node.args[0]))
    a, b = node.args[1], node.args[2]
    if isinstance(a, int) and isinstance(b, int):
        x.insert(b % len(x), x.pop(a % len(x)))
        return x
    return walk.opaque(node)


@rule("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(walk: Walk, node: fx.Node) -> Value:
    """Repeated axes have one value everywhere: as many positions can go as the others want."""
    x, shape = walk.axes(node.args[0]), walk.shape(node)
    x = [() for _ in range(len(shape) - len(x))] + list(x)
    return [axis if size_of(axis) == n else walk.store.fresh(n) for axis, n in zip(x, shape, strict=True)]


@rule("repeat", "tile")
def repeat(walk: Walk, node: fx.Node) -> Value:
    """An axis n times over: (n, axis)."""
    x, shape = walk.axes(node.args[0]), walk.shape(node)
    x = [() for _ in range(len(shape) - len(x))] + list(x)
    return [(*walk.store.fresh(n // size_of(axis)), *axis) for axis, n in zip(x, shape, strict=True)]


@rule("repeat_interleave")
def repeat_interleave(walk: Walk, node: fx.Node) -> Value:
    """Every position n times: (axis, n)."""
    if any(isinstance(a, fx.Node) for a in node.args[1:]) or walk.argument(node, "dim") is None:
        return walk.opaque(node)
    x, shape = list(walk.axes(node.args[0])), walk.shape(node)
    d = int(walk.argument(node, "dim")) % len(x)
    x[d] = (*x[d], *walk.store.fresh(shape[d] // size_of(x[d])))
    return x


@rule("cat", "concat", "concatenate", "hstack")
def cat(walk: Walk, node: fx.Node) -> Value:
    """Axes one after the other; the other axes are joined."""
    parts = [p for p in node.args[0] if walk.shape(p) != (0,)]  # type: ignore[union-attr]
    columns = operator_name(node) == "hstack" and len(walk.shape(node)) > 1
    d = int(walk.argument(node, "dim", int(columns))) % len(walk.shape(node))
    tensors = [list(walk.axes(p)) for p in parts]
    result = walk.broadcast([[() if k == d else a for k, a in enumerate(t)] for t in tensors], node)
    result[d] = walk.store.concatenate([t[d] for t in tensors], walk.why(node))
    return result


@rule("stack")
def stack(walk: Walk, node: fx.Node) -> Value:
    """A new axis, whose positions are what was stacked."""
    parts = list(node.args[0])  # type: ignore[arg-type]
    result = walk.broadcast([walk.axes(p) for p in parts], node)
    d = int(walk.argument(node, "dim", 0)) % len(walk.shape(node))
    return [*result[:d], fixed(len(parts)), *result[d:]]


@rule("chunk", "split", "tensor_split")
def chunk(walk: Walk, node: fx.Node) -> Value:
    """Equal parts of an axis stay equal: a position of each part goes together."""
    x, d, sizes = _parts(walk, node)
    if labelled(x[d]) and len(set(sizes)) == 1:
        outer, inner = walk.store.regroup([x[d]], (len(sizes), sizes[0]), walk.why(node))
        walk.store.freeze(outer, walk.why(node))
        if inner or sizes[0] == 1:
            return [[*x[:d], inner, *x[d + 1 :]] for _ in sizes]
    if len(set(sizes)) > 1:
        walk.store.freeze(x[d], walk.why(node))
    return _pieces(walk, x, d, sizes)


@rule("split_with_sizes", "split_with_sizes_copy")
def split_with_sizes(walk: Walk, node: fx.Node) -> Value:
    """Parts of an axis, each with its own positions."""
    x, d, sizes = _parts(walk, node)
    return _pieces(walk, x, d, sizes)


def _parts(walk: Walk, node: fx.Node) -> tuple[Axes, int, list[int]]:
    x = list(walk.axes(node.args[0]))
    d = int(walk.argument(node, "dim", 0)) % len(x)
    return x, d, [int(v.shape[d]) for v in node.meta["val"]]


def _pieces(walk: Walk, x: Axes, d: int, sizes: list[int]) -> list[Axes]:
    ends = np.cumsum(sizes)
    return [
        [*x[:d], walk.store.take(x[d], np.arange(end - size, end)), *x[d + 1 :]] for end, size in zip(ends, sizes, strict=True)
    ]


@rule("unbind")
def unbind(walk: Walk, node: fx.Node) -> Value:
    """The axis is counted out by name: it stays."""
    x = list(walk.axes(node.args[0]))
    d = int(walk.argument(node, "dim", 0)) % len(x)
    walk.store.freeze(x[d], walk.why(node))
    rest = [*x[:d], *x[d + 1 :]]
    return [list(rest) for _ in node.meta["val"]]


@rule("select", "select_copy")
def select(walk: Walk, node: fx.Node) -> Value:
    """One position of an axis is asked for by number: the axis stays."""
    x = list(walk.axes(node.args[0]))
    d = number(node.args[1]) % len(x)
    walk.store.freeze(x[d], walk.why(node))
    return [*x[:d], *x[d + 1 :]]


@rule("slice", "slice_copy", "narrow")
def slice_(walk: Walk, node: fx.Node) -> Value:
    """Some positions of an axis; where every second is taken, neighbours go together."""
    x = list(walk.axes(node.args[0]))
    d = int(walk.argument(node, "dim", 0)) % len(x)
    n = walk.shape(node.args[0])[d]
    if "narrow" in node.target.__name__:  # type: ignore[union-attr]
        start = node.args[2]
        positions = np.arange(number(start), number(start) + number(node.args[3]))
        step = 1
    else:
        step = int(walk.argument(node, "step", 1))
        positions = np.arange(n)[_bounds(walk, node)]
    if len(positions) == n:
        return x
    if step > 1 and labelled(x[d]) and n % step == 0 and len(positions) == n // step:
        outer, inner = walk.store.regroup([x[d]], (n // step, step), walk.why(node))
        walk.store.freeze(inner, walk.why(node))
        x[d] = outer
        return x
    x[d] = walk.store.take(x[d], positions) if labelled(x[d]) else fixed(len(positions))
    return x


def _bounds(walk: Walk, node: fx.Node) -> slice:
    start: Any = walk.argument(node, "start")
    end: Any = walk.argument(node, "end")
    return slice(start, end, int(walk.argument(node, "step", 1)))


@rule("roll")
def roll(walk: Walk, node: fx.Node) -> Value:
    """Positions move around: an axis that is rolled stays."""
    return _locked(walk, node, walk.argument(node, "dims"))


@rule("flip")
def flip(walk: Walk, node: fx.Node) -> Value:
    """Positions in reverse order."""
    x = list(walk.axes(node.args[0]))
    for d in walk.argument(node, "dims"):
        atom = walk.store.vector(x[d])
        x[d] = x[d] if atom.labels is None else walk.store.take((atom,), np.arange(atom.size)[::-1].copy())
    return x


@rule("unfold")
def unfold(walk: Walk, node: fx.Node) -> Value:
    """Windows along one axis, which stays; the new last axis is a place in the window."""
    x, shape = list(walk.axes(node.args[0])), walk.shape(node)
    d = int(walk.argument(node, "dimension", 0)) % len(x)
    walk.store.freeze(x[d], walk.why(node))
    x[d] = fixed(shape[d])
    return [*x, fixed(shape[-1])]


@rule("diagonal", "triu", "tril")
def diagonal(walk: Walk, node: fx.Node) -> Value:
    """Two axes are read together: they stay."""
    x = walk.axes(node.args[0])
    if len(walk.shape(node)) != len(x):
        return walk.opaque(node)
    for axis in x[-2:]:
        walk.store.freeze(axis, walk.why(node))
    return x


def _locked(walk: Walk, node: fx.Node, dims: Any) -> Axes:
    x: list[Axis] = list(walk.axes(node.args[0]))
    over = range(len(x)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    for d in over:
        walk.store.freeze(x[d], walk.why(node))
    return x
