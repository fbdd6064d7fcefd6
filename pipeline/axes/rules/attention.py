"""Fused attention: heads go whole, dimensions of queries go with those of keys."""

from __future__ import annotations

import math

from torch import fx

from ..algebra import Axis, size_of
from ..capture import owner
from ..cutting.scaling import rescale_of
from ..walk import Value, Walk, rule

HEADS = ("num_heads", "num_attention_heads", "heads", "n_heads", "nhead", "n_head")
DIMENSIONS = ("head_dim", "attention_head_size", "dim_head", "dim_per_head", "d_kv")
WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "dim_attn")


def count_heads(walk: Walk, node: fx.Node, heads: Axis, depth: Axis, value: Axis) -> None:
    """Name the attributes in which attention modules hold their sizes."""
    walk.count(node, heads, *HEADS)
    walk.count(node, depth, *DIMENSIONS)
    walk.count(node, (*heads, *value), *WIDTHS)


@rule("scaled_dot_product_attention")
def attention(walk: Walk, node: fx.Node) -> Value:
    """softmax(q k^T / sqrt(d)) v, with one key and value head for several query heads where there are fewer of them."""
    q, k, v = (list(walk.axes(a)) for a in node.args[:3])
    why, store = walk.why(node), walk.store
    depth = walk.join(q[-1], k[-1], node)
    if walk.argument(node, "scale") is None and not owner(node)[1].endswith("activation.MultiheadAttention"):
        made = rescale_of(node.args[0], walk.captured.names, depth)  # type: ignore[arg-type]
        if made is not None:
            walk.rescales.append(made)
        else:
            store.freeze(depth, f"{why} divides by the root of the number of dimensions")
    for axis in (q[-2], k[-2], v[-2]):
        store.freeze(axis, why)
    batch = walk.broadcast([k[:-2], v[:-2]], node)
    if bool(walk.argument(node, "enable_gqa", False)) and len(q) > 2 and size_of(q[-3]) != size_of(batch[-1]):
        shared, each = store.regroup([q[-3]], (size_of(batch[-1]), size_of(q[-3]) // size_of(batch[-1])), why)
        store.freeze(each, f"{why} shares keys between query heads")
        batch = [*walk.broadcast([q[:-3], batch[:-1]], node), (*walk.join(shared, batch[-1], node), *each)]
    else:
        batch = walk.broadcast([q[:-2], batch], node)
    for axis in batch:
        store.mark(axis, "head")
    store.mark(depth, "head_dim")
    store.mark(v[-1], "value_dim")
    count_heads(walk, node, batch[-1] if batch else (), depth, v[-1])
    mask = walk.argument(node, "attn_mask")
    if isinstance(mask, fx.Node):
        walk.broadcast([[*batch, q[-2], k[-2]], walk.axes(mask)], node)
    places = math.prod(size_of(a) for a in batch) * size_of(q[-2]) * size_of(k[-2])
    walk.cost(node, places * size_of(q[-1]), *batch, depth)
    walk.cost(node, places * size_of(v[-1]), *batch, v[-1])
    return [*batch, q[-2], v[-1]]
