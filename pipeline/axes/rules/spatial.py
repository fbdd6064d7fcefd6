"""Convolutions of any dimension, pooling, interpolation, padding and pixel shuffle."""

from __future__ import annotations

import math

from torch import fx

from ..algebra import Axis, fixed, size_of
from ..capture import owner
from ..walk import Axes, Count, Value, Walk, number, rule


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(walk: Walk, node: fx.Node) -> Value:
    """Outputs are new channels; inputs are cut from the weight. Groups of channels can go whole, or a share of each."""
    x, weight = node.args[0], node.args[1]
    transposed = "transpose" in node.target.__name__ or bool(walk.argument(node, "transposed", False))  # type: ignore[union-attr]
    groups = int(walk.argument(node, "groups", 1))
    incoming, first, second = list(walk.axes(x)), walk.axes(weight)[0], walk.axes(weight)[1]
    batched = len(incoming) == len(walk.shape(weight))
    at = 1 if batched else 0
    for axis in (*incoming[at + 1 :], *walk.axes(weight)[2:]):
        walk.store.freeze(axis, walk.why(node))
    channels = incoming[at]
    if groups == 1:
        ins, outs = (first, second) if transposed else (second, first)
        _contract(walk, channels, ins, node)
        produced = outs
    else:
        produced = _grouped(walk, node, channels, first, second, groups, transposed)
    bias = walk.argument(node, "bias")
    if isinstance(bias, fx.Node):
        produced = walk.join(produced, walk.axes(bias)[0], node)
    if walk.shape(node)[at] == 1:
        produced = ()
    shape, kernel = walk.shape(node), walk.shape(weight)
    places = math.prod(walk.shape(x)[at + 1 :] if transposed else shape[at + 1 :]) * (shape[0] if batched else 1)
    # the weight of a grouped convolution holds each group once, its inputs and outputs name it twice
    walk.cost(node, places * math.prod(kernel), *((channels, produced) if groups == 1 else (first, second)))
    result = [*incoming[:at], produced, *(fixed(n) for n in shape[at + 1 :])]
    walk.store.mark(produced, "channel")
    return result


def _contract(walk: Walk, channels: Axis, ins: Axis, node: fx.Node) -> None:
    if size_of(channels) == size_of(ins):
        walk.join(channels, ins, node)


def _grouped(walk: Walk, node: fx.Node, channels: Axis, first: Axis, second: Axis, groups: int, transposed: bool) -> Axis:
    """Join input and weight group by group: (groups, inputs of each) and (groups, outputs of each)."""
    store, why = walk.store, walk.why(node)
    count = size_of(channels)
    outer, inner = store.regroup([channels], (groups, count // groups), why)
    if transposed:  # (in, out / groups, ...)
        g, i = store.regroup([first], (groups, count // groups), why)
        outer = walk.join(outer, g, node)
        walk.join(inner, i, node)
        produced = (*outer, *second)
    else:
        g, o = store.regroup([first], (groups, size_of(first) // groups), why)
        outer = walk.join(outer, g, node)
        walk.join(inner, second, node)
        produced = (*outer, *o)
    if count != groups:
        store.mark(outer, "group")
    walk.counts.append(Count(owner(node)[0], "groups", outer))
    return produced


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "_adaptive_avg_pool2d", "lp_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "grid_sampler", "grid_sampler_2d",
)  # fmt: skip
def places(walk: Walk, node: fx.Node) -> Value:
    """Operators on the places of a map: batch and channels stay as they are."""
    x = walk.axes(node.args[0])
    for other in node.all_input_nodes[1:]:
        walk.freeze(other, walk.why(node))
    value = node.meta["val"]
    shape = tuple(int(n) for n in (value[0] if isinstance(value, list | tuple) else value).shape)
    name = node.target.__name__.split(".")[0]  # type: ignore[union-attr]
    digits = [int(c) for c in name if c in "123"]
    rank = digits[0] if digits else len(shape) - 2
    keep = len(shape) - rank
    for axis in x[keep:]:
        walk.store.freeze(axis, walk.why(node))
    result: Axes = [*x[:keep], *(fixed(n) for n in shape[keep:])]
    return [result, result] if isinstance(value, list | tuple) else result


@rule("pad", "constant_pad_nd", "_pad_enum")
def pad(walk: Walk, node: fx.Node) -> Value:
    """Padded axes get positions that stay; axes without padding pass."""
    x, amounts = list(walk.axes(node.args[0])), list(node.args[1])  # type: ignore[arg-type]
    shape, before = walk.shape(node), walk.shape(node.args[0])
    mode = walk.argument(node, "mode", "constant")
    for k in range(len(amounts) // 2):
        axis = len(x) - 1 - k
        front, back = int(amounts[2 * k]), int(amounts[2 * k + 1])
        if not front and not back:
            continue
        if mode != "constant" or front < 0 or back < 0 or not x[axis]:
            walk.store.freeze(x[axis], walk.why(node))
            x[axis] = fixed(shape[axis])
        elif any(a.labels is not None for a in x[axis]):
            x[axis] = walk.store.concatenate(
                [fixed(front)] * (front > 0) + [x[axis]] + [fixed(back)] * (back > 0), walk.why(node)
            )
        else:
            x[axis] = fixed(shape[axis])
    return x if len(before) == len(shape) else walk.opaque(node)


@rule("pixel_shuffle")
def pixel_shuffle(walk: Walk, node: fx.Node) -> Value:
    """Channel c of the result comes from r * r neighbouring channels, which go together."""
    x, factor = walk.axes(node.args[0]), number(node.args[1])
    shape = walk.shape(node)
    channels, inner = walk.store.regroup([x[-3]], (shape[-3], factor * factor), walk.why(node))
    walk.store.freeze(inner, walk.why(node))
    return [*x[:-3], channels, fixed(shape[-2]), fixed(shape[-1])]


@rule("pixel_unshuffle")
def pixel_unshuffle(walk: Walk, node: fx.Node) -> Value:
    """Every channel becomes r * r neighbouring ones."""
    x, factor = walk.axes(node.args[0]), number(node.args[1])
    shape = walk.shape(node)
    return [*x[:-3], (*x[-3], *fixed(factor * factor)), fixed(shape[-2]), fixed(shape[-1])]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(walk: Walk, node: fx.Node) -> Value:
    """(groups, each) becomes (each, groups)."""
    x, groups = list(walk.axes(node.args[0])), number(node.args[1])
    count = walk.shape(node)[1]
    outer, inner = walk.store.regroup([x[1]], (groups, count // groups), walk.why(node))
    walk.store.freeze(outer, walk.why(node))
    x[1] = (*inner, *outer)
    return x


@rule("unfold_dim", "im2col")
def im2col(walk: Walk, node: fx.Node) -> Value:
    """(N, C, H, W) becomes (N, C * kernel, places)."""
    x, shape = walk.axes(node.args[0]), walk.shape(node)
    channels = walk.shape(node.args[0])[1]
    return [x[0], (*x[1], *fixed(shape[1] // channels)), fixed(shape[2])]


@rule("col2im")
def col2im(walk: Walk, node: fx.Node) -> Value:
    """(N, C * kernel, places) becomes (N, C, H, W)."""
    x, shape = walk.axes(node.args[0]), walk.shape(node)
    channels, kernel = walk.store.regroup([x[1]], (shape[1], walk.shape(node.args[0])[1] // shape[1]), walk.why(node))
    walk.store.freeze(kernel, walk.why(node))
    return [x[0], channels, fixed(shape[2]), fixed(shape[3])]
