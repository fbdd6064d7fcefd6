"""Finds what can be removed from a network: groups of coupled channels, and residual branches with the groups inside them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import InputError
from .blocks import find_branches
from .labels import Labels, Place, Stop
from .trace import argument, is_layer, layer_nodes, shape_of, submodule
from .units import Block, Group, Locked, Slice, Unit


@dataclass(frozen=True)
class Coupling:
    """All that can be removed from a canonical network, and what cannot."""

    groups: tuple[Group, ...]  # channel groups in the order of their first producer, then blocks
    units: dict[str, tuple[Unit, ...]]  # channel group -> its units
    blocks: dict[str, Block]
    locked: tuple[Locked, ...] = ()  # the one that keeps most multiply-accumulates first
    locked_blocks: dict[str, str] = field(default_factory=dict)  # residual branches that cannot be removed -> why
    prunable_macs_share: float = 1.0  # in layers that the removal of some channel makes cheaper

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Modules that some unit has a slice of, by name."""
        return tuple(sorted({s.layer for units in self.units.values() for unit in units for s in unit.slices}))


def couple(net: fx.GraphModule) -> Coupling:
    """Channel groups and removable blocks of a canonical network whose shapes have been propagated (see `trace.canonical`).

    A group's kind is "coupled" where an addition takes its channels from several layers (shortcut-coupled channels), else
    "inner": also behind a gate, whose factors are removed with the channels that they scale.

    Raises:
        InputError: nothing can be removed; the message names the last layer and what keeps it.
    """
    labels = Labels(net)
    frozen, added = labels.frozen(), labels.added()
    order = {str(n.target): i for i, n in enumerate(net.graph.nodes) if n.op == "call_module"}
    by_signature: dict[tuple[tuple[str, int], ...], list[tuple[int, list[Place]]]] = defaultdict(list)
    for root, found in labels.places().items():
        if root not in frozen:
            places = sorted(set(found), key=lambda p: (order[p[0]], *p[1:]))
            by_signature[tuple(dict.fromkeys((layer, axis) for layer, axis, _ in places))].append((root, places))
    groups: list[Group] = []
    units: dict[str, tuple[Unit, ...]] = {}
    for signature, carried in by_signature.items():
        producers = tuple(layer for layer, axis in signature if axis == 0 and _makes_channels(net, layer))
        consumers = tuple(layer for layer, axis in signature if axis == 1)
        if not producers or not consumers:
            continue
        carried.sort(key=lambda item: next(position for layer, _, position in item[1] if layer == producers[0]))
        first = carried[0][1][0]
        name = producers[0] if producers[0] not in units else f"{producers[0]}:{first[2]}"
        kind = "coupled" if any(root in added for root, _ in carried) else "inner"
        groups.append(Group(name, kind, len(carried), producers, consumers))
        units[name] = tuple(Unit(_slices(net, places)) for _, places in carried)
    groups.sort(key=lambda g: order[g.producers[0]])
    branches, locked_blocks = find_branches(net)
    inside = {b.name: tuple(g.name for g in groups if {*g.producers, *g.consumers} <= {*b.layers}) for b in branches.values()}
    blocks = {name: replace(block, groups=inside[name]) for name, block in branches.items()}
    groups += [Group(b.name, "block", 1, b.layers, ()) for b in blocks.values()]
    if not groups:
        raise InputError(
            "nothing can be removed from the network",
            found=f"layer {[str(n.target) for n, _ in layer_nodes(net)][-1]}, whose outputs reach "
            + ("; ".join(f"{s.operation} ({s.reason})" for s in labels.stops[-2:]) or "nothing"),
            expected="a layer whose outputs only convolutions, linear layers or additions read",
            do="use --pattern weight, or a network with inner layers",
        )
    changed = {s.layer for of in units.values() for unit in of for s in unit.slices}
    locked, share = _locked(net, labels, frozen, changed)
    return Coupling(tuple(groups), units, blocks, locked, locked_blocks, share)


def _makes_channels(net: fx.GraphModule, layer: str) -> bool:
    """Whether a module is a layer that is not depthwise: a depthwise convolution's outputs are its inputs."""
    module = net.get_submodule(layer)
    return is_layer(module) and not (isinstance(module, nn.Conv2d) and module.groups > 1)


def _slices(net: fx.GraphModule, places: list[Place]) -> tuple[Slice, ...]:
    """Slices of all parameters and buffers at these places: a layer's outputs are rows of its weight and of its bias."""
    positions: dict[tuple[str, int], list[int]] = defaultdict(list)
    for layer, axis, position in places:
        positions[layer, axis].append(position)
    found = []
    for (layer, axis), indices in positions.items():
        module = net.get_submodule(layer)
        tensors = {**module._parameters, **module._buffers} if axis == 0 else {"weight": module.weight}
        sliced = [n for n, tensor in tensors.items() if isinstance(tensor, torch.Tensor) and tensor.ndim > axis]
        found += [Slice(f"{layer}.{name}", axis, tuple(indices)) for name in sliced]
    return tuple(found)


def _locked(net: fx.GraphModule, labels: Labels, frozen: dict[int, Stop], changed: set[str]) -> tuple[tuple[Locked, ...], float]:
    """What keeps channels, with the share of multiply-accumulates that no removal makes cheaper; and the share of the others."""
    macs: dict[Stop | None, int] = defaultdict(int)
    kept: dict[Stop, set[int]] = defaultdict(set)
    for node in net.graph.nodes:
        cost = _macs(net, node)
        if not cost:
            continue
        outputs = [labels.root(label) for label in labels.at.get(node, ())]
        inputs = [labels.root(label) for source in node.all_input_nodes for label in labels.at.get(source, ())]
        if isinstance(module := submodule(net, node), nn.Linear) and len(shape_of(node) or ()) > 2:
            kept[frozen[outputs[0]]].update(range(-module.out_features, 0))  # its channels are its last dimension
        else:
            for root in frozen.keys() & outputs:
                kept[frozen[root]].add(root)
        stops = [frozen[root] for root in (*outputs, *inputs) if root in frozen]
        inner = [stop for stop in stops if stop.operation not in ("placeholder", "output")]
        macs[None if str(node.target) in changed else next(iter(inner or stops), None)] += cost
    total = sum(macs.values())
    found = [
        Locked(stop.operation, stop.module, stop.reason, len(kept[stop]), macs[stop] / total)
        for stop in dict.fromkeys((*kept, *macs))
        if stop is not None
    ]
    return tuple(sorted(found, key=lambda lock: -lock.macs_share)), macs[None] / total


def _macs(net: fx.GraphModule, node: fx.Node) -> int:
    """Multiply-accumulates for one image of a convolution or a linear layer, as a module or as a function; else 0."""
    module, weight = submodule(net, node), argument(node, 1, "weight")
    if is_layer(module):
        shape: tuple[int, ...] = tuple(module.weight.shape)
    elif node.target in (F.conv2d, F.linear) and isinstance(weight, fx.Node):
        shape = shape_of(weight) or ()
    else:
        return 0
    return prod((shape_of(node) or (1,))[1:]) * prod(shape[1:])
