"""Convolutions that standardise their weights at every call: given the weights they compute, as ordinary convolutions.

Weight standardisation (Qiao et al. 2019, arXiv 1903.10520) divides by the spread over a filter's inputs, so that an input
cannot be cut without changing the rest of the filter. With the weights as they are in eval mode, it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


class FoldedConv2d(nn.Conv2d):
    """A convolution that pads as the one it stands for did."""

    pads: tuple[int, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The convolution of the padded input."""
        return super().forward(F.pad(input, self.pads) if any(self.pads) else input)


def fold_computed_weights(module: nn.Module, graph: fx.Graph, names: Mapping[str, str], owner: Any) -> Iterator[str]:
    """Replace, in `module`, convolutions whose weight is computed from parameters alone; says which.

    One that does more than pad with zeros and convolve stays: with other padding, another bias, or modules of its own.
    """
    by_owner: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            by_owner.setdefault(owner(node)[0], []).append(node)
    for name, nodes in by_owner.items():
        old = module.get_submodule(name)
        convs = [n for n in nodes if n.target is torch.ops.aten.conv2d.default]
        if not name or not isinstance(old, nn.Conv2d) or type(old) is nn.Conv2d or len(convs) != 1:
            continue
        new = _ordinary(old, convs[0], set(nodes), module, names)
        if new is None:
            continue
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new.train(old.training))
        yield f"{name}: {type(old).__name__} folded into an ordinary convolution"


def _ordinary(
    old: nn.Conv2d, conv: fx.Node, nodes: set[fx.Node], module: nn.Module, names: Mapping[str, str]
) -> FoldedConv2d | None:
    """The ordinary convolution that answers as `old` does, whose operators are `nodes`; None where there is none."""
    data, weight, bias = conv.args[0], conv.args[1], conv.args[2] if len(conv.args) > 2 else None
    if not isinstance(data, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "call_function":
        return None
    chain = _ancestors(weight)
    others = nodes - chain - {conv}
    if any(n.op == "placeholder" and n.name not in names for n in chain) or not others <= {data}:
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or bias.name not in names):
        return None
    if (None if bias is None else _value(bias, module, names, {})) is not old.bias:
        return None
    pads = _zeros_around(data) if others else ()
    if pads is None:
        return None
    with torch.no_grad():
        found = _value(weight, module, names, {})
    arguments: dict[str, Any] = dict(zip(("stride", "padding", "dilation", "groups"), conv.args[3:], strict=False))
    inputs = found.shape[1] * arguments.get("groups", 1)
    new = FoldedConv2d(inputs, found.shape[0], found.shape[2:], bias=old.bias is not None, **arguments)
    new.weight, new.bias, new.pads = nn.Parameter(found.detach().clone()), old.bias, pads
    source: Any = data.args[0] if others else data
    return new if _same(old, new.eval(), source.meta["val"]) else None


def _zeros_around(node: fx.Node) -> tuple[int, ...] | None:
    """The amounts of a padding with zeros; None for any other operator."""
    if node.target not in (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default):
        return None
    places = ("mode", "value") if node.target is torch.ops.aten.pad.default else ("value",)
    given = dict(zip(places, node.args[2:], strict=False)) | node.kwargs
    amounts: Any = node.args[1]
    return tuple(int(p) for p in amounts) if given.get("mode", "constant") == "constant" and not given.get("value") else None


def _same(old: nn.Module, new: nn.Module, like: torch.Tensor) -> bool:
    """Whether two layers answer alike: what `old` calls beside its own operators is not in the ordinary convolution."""
    inputs = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(next(new.parameters()))
    try:
        with torch.no_grad():
            expected, found = old(inputs.clone()), new(inputs)
    except Exception:  # the user's own code, called otherwise than by its network
        return False
    return isinstance(expected, torch.Tensor) and expected.shape == found.shape and torch.allclose(found, expected, 1e-4, 1e-5)


def _ancestors(node: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        here = queue.pop()
        if here not in found:
            found.add(here)
            queue.extend(here.all_input_nodes)
    return found


def _value(node: Any, module: nn.Module, names: Mapping[str, str], known: dict[fx.Node, Any]) -> Any:
    """What a node computes from parameters."""
    if node not in known:
        if node.op == "placeholder":
            holder, _, tensor = names[node.name].rpartition(".")
            known[node] = getattr(module.get_submodule(holder), tensor)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _value(n, module, names, known))
            known[node] = node.target(*args, **kwargs)
    return known[node]
