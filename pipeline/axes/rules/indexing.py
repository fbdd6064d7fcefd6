"""Look-ups by index: embeddings, tables of relative positions, gathered rows."""

from __future__ import annotations

from torch import fx

from ..algebra import fixed
from ..walk import Axes, Value, Walk, number, rule


@rule("embedding")
def embedding(walk: Walk, node: fx.Node) -> Value:
    """Rows are asked for by number and stay; columns are units."""
    table, index = walk.axes(node.args[0]), walk.axes(node.args[1])
    walk.store.freeze(table[0], walk.why(node))
    return [*index, table[1]]


@rule("index", "_unsafe_index")
def index(walk: Walk, node: fx.Node) -> Value:
    """Indexed axes stay; the others pass."""
    x, shape = walk.axes(node.args[0]), walk.shape(node)
    indices = list(node.args[1])  # type: ignore[arg-type]
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        walk.store.freeze(x[d], walk.why(node))
        walk.freeze(indices[d], walk.why(node))
    rest = [d for d in range(len(x)) if d not in used]
    new = len(shape) - len(rest)
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    before = [x[d] for d in rest if together and d < at]
    after = [x[d] for d in rest if not together or d > at]
    result: Axes = [*before, *(fixed(n) for n in shape[len(before) : len(before) + new]), *after]
    return result


@rule("index_select")
def index_select(walk: Walk, node: fx.Node) -> Value:
    """One axis is indexed and stays; the others pass."""
    x = list(walk.axes(node.args[0]))
    d = number(node.args[1]) % len(x)
    walk.store.freeze(x[d], walk.why(node))
    x[d] = fixed(walk.shape(node)[d])
    return x


@rule("gather")
def gather(walk: Walk, node: fx.Node) -> Value:
    """One axis is indexed and stays; the others are joined with those of the index."""
    x, i = list(walk.axes(node.args[0])), list(walk.axes(node.args[2]))
    d = number(node.args[1]) % len(x)
    walk.store.freeze(x[d], walk.why(node))
    shape, before = walk.shape(node), walk.shape(node.args[0])
    for k in range(len(x)):
        if k != d and shape[k] == before[k]:
            x[k] = walk.join(x[k], i[k], node)
        elif k != d:
            walk.store.freeze(x[k], walk.why(node))
            x[k] = fixed(shape[k])
    x[d] = fixed(shape[d])
    return x
