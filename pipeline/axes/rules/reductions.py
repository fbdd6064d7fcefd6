"""Sums, means, maxima and softmax."""

from __future__ import annotations

from torch import fx

from ..algebra import fixed, labelled
from ..cutting.scaling import mean_rescale_of
from ..walk import Axes, Value, Walk, rule


def reduced(walk: Walk, node: fx.Node, exact: bool) -> Axes:
    """The axes left after a reduction; those reduced over are locked unless units that are zero change nothing."""
    x = walk.axes(node.args[0])
    dims = walk.argument(node, "dim")
    over = range(len(x)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {int(d) % max(len(x), 1) for d in over}
    for d in gone:
        if exact:
            walk.store.mark(x[d], "summed")
        else:
            walk.store.freeze(x[d], walk.why(node))
    keep = bool(walk.argument(node, "keepdim", False))
    return [() if d in gone else axis for d, axis in enumerate(x) if keep or d not in gone]


@rule("sum", "nansum")
def total(walk: Walk, node: fx.Node) -> Value:
    """A unit that is zero adds nothing."""
    return reduced(walk, node, exact=True)


@rule("mean")
def mean(walk: Walk, node: fx.Node) -> Value:
    """A unit that is zero still counts, unless the weight of a normalisation can absorb their number."""
    x = walk.axes(node.args[0])
    dims = walk.argument(node, "dim") or []
    over = [x[d] for d in dims if labelled(x[d])]
    made = mean_rescale_of(node, walk.captured.names, over[0]) if len(over) == 1 else None
    if made is not None:
        walk.rescales.append(made)
    return reduced(walk, node, exact=made is not None)


@rule("amax", "amin", "var", "std", "prod", "logsumexp", "any", "all", "argmax", "argmin", "median")
def mixing(walk: Walk, node: fx.Node) -> Value:
    """A unit that is zero still counts."""
    return reduced(walk, node, exact=False)


@rule("max", "min", "var_mean", "std_mean", "topk", "sort", "kthvalue")
def several(walk: Walk, node: fx.Node) -> Value:
    """Reductions with two results, or the element-wise maximum of two tensors."""
    other = walk.argument(node, "other")
    if isinstance(other, fx.Node):
        return walk.broadcast([walk.axes(node.args[0]), walk.axes(other)], node)
    value = node.meta["val"]
    if not isinstance(value, list | tuple):
        return walk.opaque(node)
    if node.target.__name__.startswith(("topk", "sort", "kthvalue")):  # type: ignore[union-attr]
        x = list(walk.axes(node.args[0]))
        d = int(walk.argument(node, "dim", -1)) % len(x)
        walk.store.freeze(x[d], walk.why(node))
        x[d] = fixed(int(value[0].shape[d]))
        return [x, x]
    result = reduced(walk, node, exact=False)
    return [result, result]


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "glu_softmax")
def softmax(walk: Walk, node: fx.Node) -> Value:
    """Positions along the axis of the softmax depend on each other."""
    x = walk.axes(node.args[0])
    if x:
        walk.store.freeze(x[int(walk.argument(node, "dim", -1)) % len(x)], walk.why(node))
    return x


@rule("glu")
def glu(walk: Walk, node: fx.Node) -> Value:
    """The first half of an axis times the sigmoid of the second: a unit of each goes together."""
    x = list(walk.axes(node.args[0]))
    d = int(walk.argument(node, "dim", -1)) % len(x)
    half = walk.shape(node)[d]
    both, each = walk.store.regroup([x[d]], (2, half), walk.why(node))
    walk.store.freeze(both, walk.why(node))
    x[d] = each
    return x
