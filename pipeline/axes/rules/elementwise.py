"""Operators that treat every position on its own: arithmetic, activations, gates, copies, constants."""

from __future__ import annotations

from torch import fx

from ..algebra import fixed, labelled, size_of
from ..walk import Value, Walk, rule


@rule(
    "pointwise", "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout", "rrelu", "selu",
    "relu6", "hardswish", "gelu", "silu", "mish", "celu", "log_sigmoid", "softplus", "softshrink", "hardshrink", "tanhshrink",
    "softsign", "square", "true_divide", "divide", "multiply", "subtract", "where", "threshold", "hardtanh", "lerp", "addcmul",
    "float_power", "rsub", "masked_fill", "clip",
    "copy", "type_as", "logical_not", "logical_and", "logical_or", "isnan", "nan_to_num",
)  # fmt: skip
def pointwise(walk: Walk, node: fx.Node) -> Value:
    """Axes of all operands are joined, those of size 1 are repeated."""
    sources = [s for s in node.all_input_nodes if walk.shape(s) or s.meta.get("val") is not None]
    result = walk.broadcast([walk.axes(s) for s in sources], node)
    shape = walk.shape(node)
    if tuple(size_of(a) for a in result) != shape:
        return walk.opaque(node)
    if node.target.__name__.startswith("add") and len(sources) == 2:  # type: ignore[union-attr]
        both = [walk.shape(s) == shape and s.op != "placeholder" for s in sources]
        if all(both):
            for axis in result:
                walk.store.mark(axis, "sum")
    return result


@rule(
    "clone", "contiguous", "detach", "alias", "to", "_to_copy", "lift_fresh_copy", "lift_fresh", "_assert_tensor_metadata",
    "positive",
    "fill", "zero", "requires_grad", "float", "half", "view_as_real_copy", "resolve_conj", "resolve_neg", "cpu", "type",
)  # fmt: skip
def same(walk: Walk, node: fx.Node) -> Value:
    """The same tensor."""
    source = node.all_input_nodes[0]
    return walk.axes(source) if walk.shape(node) else []


@rule("getitem")
def getitem(walk: Walk, node: fx.Node) -> Value:
    """One of an operator's several results."""
    return walk.values[node.args[0]][node.args[1]]  # type: ignore[index, return-value]


@rule("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_like")
def like(walk: Walk, node: fx.Node) -> Value:
    """A constant of another tensor's shape: whatever goes there goes here."""
    if tuple(walk.shape(node.args[0])) == walk.shape(node):
        return walk.axes(node.args[0])
    return constant(walk, node)


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor", "empty", "new_empty")
def constant(walk: Walk, node: fx.Node) -> Value:
    """A tensor of one value: as many positions of it can go as the others want."""
    return [walk.store.fresh(n) for n in walk.shape(node)]


@rule("arange", "linspace", "eye", "tril_indices", "_assert_scalar", "sym_size", "_assert_async")
def numbers(walk: Walk, node: fx.Node) -> Value:
    """Counted positions: they are places, not units."""
    return [fixed(n) for n in walk.shape(node)]


@rule("prelu", "_prelu_kernel")
def prelu(walk: Walk, node: fx.Node) -> Value:
    """The slopes lie along the channels, or there is one for all."""
    x = list(walk.axes(node.args[0]))
    slope = walk.axes(node.args[1])
    if len(slope) == 1 and slope[0]:
        k = 1 if len(x) > 1 else 0
        x[k] = walk.join(x[k], slope[0], node)
    elif any(labelled(a) for a in slope):
        return walk.broadcast([x, slope], node)
    return x


@rule("bernoulli", "rand", "randn")
def chance(walk: Walk, node: fx.Node) -> Value:
    """Random numbers no one reads in eval mode."""
    return [fixed(n) for n in walk.shape(node)]
