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
    """Replace, in `module`, convolutions whose weight is computed from parameters alone; says which."""
    by_owner: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            by_owner.setdefault(owner(node)[0], []).append(node)
    for name, nodes in by_owner.items():
        convs = [n for n in nodes if n.target is torch.ops.aten.conv2d.default]
        if len(convs) != 1 or convs[0].args[1].op != "call_function":  # type: ignore[union-attr]
            continue
        conv, old = convs[0], module.get_submodule(name)
        chain = _ancestors(conv.args[1])
        inputs = {n for n in chain if n.op == "placeholder"}
        rest = set(nodes) - chain - {conv}
        pads = [n for n in rest if n.target in (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default)]
        if (
            type(old) is nn.Conv2d
            or not isinstance(old, nn.Conv2d)
            or not inputs <= _stored(graph, names)
            or len(rest) > len(pads) > 1
        ):
            continue
        if (pads and (len(pads) > 1 or conv.args[0] is not pads[0])) or set(pads) != rest:
            continue
        with torch.no_grad():
            weight = _value(conv.args[1], module, names, {})
        arguments: dict[str, Any] = dict(zip(("stride", "padding", "dilation", "groups"), conv.args[3:], strict=False))
        groups = arguments.get("groups", 1)
        new = FoldedConv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2:], bias=old.bias is not None, **arguments)
        new.weight, new.bias = nn.Parameter(weight.detach().clone()), old.bias
        amounts: Any = pads[0].args[1] if pads else ()
        new.pads = tuple(int(p) for p in amounts)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new.train(old.training))
        yield f"{name}: {type(old).__name__} folded into an ordinary convolution"


def _ancestors(node: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        here = queue.pop()
        if here not in found:
            found.add(here)
            queue.extend(here.all_input_nodes)
    return found


def _stored(graph: fx.Graph, names: Mapping[str, str]) -> set[fx.Node]:
    return {n for n in graph.nodes if n.op == "placeholder" and n.name in names}


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
