"""Normalisations: statistics of each channel leave the units alone, statistics over units lock them, except in RMSNorm."""

from __future__ import annotations

from torch import fx

from ..algebra import Axis, size_of
from ..capture import operator_name, owner
from ..cutting.scaling import norm_rescale_of
from ..walk import Count, Value, Walk, rule


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "instance_norm", "cudnn_batch_norm")
def batch_norm(walk: Walk, node: fx.Node) -> Value:
    """Affine parameters and statistics lie along the channels."""
    x = list(walk.axes(node.args[0]))
    for other in node.args[1:5]:
        if isinstance(other, fx.Node) and len(walk.axes(other)) == 1:
            x[1] = walk.join(x[1], walk.axes(other)[0], node)
    if bool(walk.argument(node, "training", walk.argument(node, "use_input_stats", False))):
        for axis in (x[0], *x[2:]):  # computed over these
            walk.store.freeze(axis, walk.why(node))
    return [x, [], []] if isinstance(node.meta["val"], list | tuple) else x


@rule("group_norm", "native_group_norm")
def group_norm(walk: Walk, node: fx.Node) -> Value:
    """A group of channels is normalised together and goes as a whole."""
    x = list(walk.axes(node.args[0]))
    groups = int(walk.argument(node, "num_groups", walk.argument(node, "group", 1)))
    channels = x[1]
    why = walk.why(node)
    for axis in x[2:]:
        walk.store.freeze(axis, why)
    count = size_of(channels)
    if groups == 1:
        walk.store.freeze(channels, f"{why} normalises over all channels together")
    elif groups < count:
        outer, inner = walk.store.regroup([channels], (groups, count // groups), why)
        walk.store.freeze(inner, f"{why} normalises over the channels of a group together")
        walk.store.mark(outer, "group")
        channels = (*outer, *inner)
    else:
        outer = channels
    if groups > 1:
        walk.counts.append(Count(owner(node)[0], "num_groups", outer))
    for name in ("weight", "bias"):
        other = walk.argument(node, name)
        if isinstance(other, fx.Node):
            channels = walk.join(channels, walk.axes(other)[0], node)
    x[1] = channels
    return [x, [], []] if isinstance(node.meta["val"], list | tuple) else x


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(walk: Walk, node: fx.Node) -> Value:
    """LayerNorm locks the axis it normalises; RMSNorm does not where its weight can absorb the number of units."""
    x = list(walk.axes(node.args[0]))
    rank = len(walk.argument(node, "normalized_shape"))
    weight, epsilon = walk.argument(node, "weight"), walk.argument(node, "eps")
    if (
        "rms" in operator_name(node)
        and rank == 1
        and (made := norm_rescale_of(node, weight, epsilon, walk.captured.names, x[-1]))
    ):
        walk.rescales.append(made)
        x[-1] = walk.join(x[-1], walk.axes(weight)[0], node)
        return [x, []] if isinstance(node.meta["val"], list | tuple) else x
    sources: list[list[Axis]] = [x[-rank:]]
    for name in ("weight", "bias"):
        other = walk.argument(node, name)
        if isinstance(other, fx.Node):
            sources.append(walk.axes(other))
    for axes in sources:
        for axis in axes:
            walk.store.freeze(axis, f"{walk.why(node)} normalises over the units")
    return [x, [], []] if isinstance(node.meta["val"], list | tuple) else x


@rule("linalg_vector_norm", "norm", "frobenius_norm")
def vector_norm(walk: Walk, node: fx.Node) -> Value:
    """A unit that is zero adds nothing to a norm."""
    from .reductions import reduced

    order = walk.argument(node, "ord", walk.argument(node, "p", 2))
    return reduced(walk, node, exact=order in (1, 2, 2.0, 1.0))
