"""What can be removed together: channels coupled through additions, and whole residual branches.

Every channel of every tensor gets a label that says where it comes from. A convolution makes new labels, element-wise
operations pass them on, an addition makes two labels one, a concatenation joins lists. Two channels with the same label can only
be removed together; labels that reach an operation which is not understood stay. This is the dependency graph of DepGraph
(Fang et al. 2023, arXiv 2301.12900) at the level of single channels instead of layers, which is what makes shifted and
zero-padded shortcuts come out right.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import InputError
from ..types import Group
from .trace import is_add, shape_of, submodule

OUT, IN, NORM = 0, 1, 2  # what a member loses: an output channel, an input channel, a channel of a normalisation


@dataclass(frozen=True)
class Member:
    """One place at which a unit is cut: channel `index` of `layer`."""

    layer: str
    role: int  # OUT, IN or NORM
    index: int


@dataclass(frozen=True)
class Unit:
    """One channel position: everything that goes when it goes."""

    members: tuple[Member, ...]


@dataclass(frozen=True)
class Block:
    """A residual branch: the addition it ends in, the operand that stays, and the layers that go."""

    name: str
    addition: str  # fx node names
    shortcut: str
    tail: str  # last layer of the branch
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Coupling:
    """All that can be removed from a canonical network."""

    groups: tuple[Group, ...]  # channel groups in the order of their first producer, then blocks
    units: dict[str, tuple[Unit, ...]]  # channel group -> its units
    blocks: dict[str, Block]


class _Labels:
    """Union-find over channel labels; a frozen label stays in the network."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.frozen: set[int] = set()

    def fresh(self, count: int) -> list[int]:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return list(range(start, start + count))

    def find(self, a: int) -> int:
        while self.parent[a] != a:
            self.parent[a] = self.parent[self.parent[a]]
            a = self.parent[a]
        return a

    def join(self, a: int, b: int) -> None:
        self.parent[self.find(b)] = self.find(a)


# Element-wise operations: channel i of the result depends on channel i of the operand(s) alone.
_PASS_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
    nn.ZeroPad2d,
)  # fmt: skip
_PASS_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.silu, F.gelu, torch.sigmoid, F.sigmoid, torch.tanh,
    F.leaky_relu, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
    F.elu, torch.max_pool2d,
}  # fmt: skip
_PASS_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float", "clamp", "to"}
_TWO_OPERANDS = {operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul, operator.sub, torch.sub}
_TWO_METHODS = {"add", "add_", "mul", "mul_", "sub"}


def couple(net: fx.GraphModule) -> Coupling:
    """Channel groups and removable blocks of a canonical network whose shapes have been propagated (see `graph.canonical`).

    Raises:
        InputError: nothing can be removed; the message names the layer that was looked at last and what keeps it.
    """
    labels, members, stops = _label(net)
    by_root: dict[int, list[Member]] = defaultdict(list)
    for label, attached in members.items():
        by_root[labels.find(label)].extend(attached)
    frozen = {labels.find(f) for f in labels.frozen}
    by_signature: dict[tuple[tuple[str, int], ...], list[Unit]] = defaultdict(list)
    order = {str(n.target): i for i, n in enumerate(net.graph.nodes) if n.op == "call_module"}
    for root, found in by_root.items():
        if root in frozen or not any(m.role == OUT for m in found):
            continue
        ordered = tuple(sorted(set(found), key=lambda m: (order[m.layer], m.role, m.index)))
        by_signature[tuple(dict.fromkeys((m.layer, m.role) for m in ordered))].append(Unit(ordered))
    groups: list[Group] = []
    units: dict[str, tuple[Unit, ...]] = {}
    for signature, found_units in by_signature.items():
        producers = tuple(layer for layer, role in signature if role == OUT and not _depthwise(net, layer))
        consumers = tuple(layer for layer, role in signature if role == IN)
        if not producers or not consumers:
            continue
        ordered_units = tuple(sorted(found_units, key=lambda u: next(m.index for m in u.members if m.layer == producers[0])))
        name = producers[0] if producers[0] not in units else f"{producers[0]}:{ordered_units[0].members[0].index}"
        kind = "stream" if len(producers) > 1 else "inner"
        groups.append(Group(name, kind, len(ordered_units), producers, consumers))
        units[name] = ordered_units
    groups.sort(key=lambda g: order[g.producers[0]])
    blocks = residual_branches(net)
    groups += [Group(b.name, "block", 1, b.layers, ()) for b in blocks.values()]
    if not groups:
        raise InputError(
            "nothing can be removed from the network",
            found=f"layer {_last_layer(net)}, whose outputs reach {'; '.join(stops[-2:]) or 'nothing'}",
            expected="a layer whose outputs only convolutions, linear layers or additions read",
            do="use --pattern weight, or a network with inner layers",
        )
    return Coupling(tuple(groups), units, blocks)


def _last_layer(net: fx.GraphModule) -> str:
    return [str(n.target) for n in net.graph.nodes if n.op == "call_module" and _is_layer(net, n)][-1]


def _depthwise(net: fx.GraphModule, layer: str) -> bool:
    module = net.get_submodule(layer)
    return isinstance(module, nn.Conv2d) and module.groups > 1


def _label(net: fx.GraphModule) -> tuple[_Labels, dict[int, list[Member]], list[str]]:
    """Walk the graph once; returns the labels, the members each label has, and where and why labels were frozen."""
    labels = _Labels()
    members: dict[int, list[Member]] = defaultdict(list)
    at: dict[fx.Node, list[int]] = {}  # node -> label of each channel (dimension 1)
    stops: list[str] = []

    def freeze(node: fx.Node, why: str) -> None:
        for source in node.all_input_nodes:
            labels.frozen.update(at.get(source, ()))
        if any(source in at for source in node.all_input_nodes):
            stops.append(f"{node.target} ({why})")
        shape = shape_of(node)
        if shape is not None and len(shape) >= 2:
            at[node] = labels.fresh(shape[1])
            labels.frozen.update(at[node])

    def attach(name: str, role: int, channels: list[int]) -> None:
        for index, label in enumerate(channels):
            members[label].append(Member(name, role, index))

    for node in net.graph.nodes:
        if node.op == "placeholder":
            freeze(node, "input")
        elif node.op == "output":
            freeze(node, "output")
        elif node.op == "call_module":
            _label_module(net, node, at, labels, attach, freeze)
        elif node.op in ("call_function", "call_method"):
            if shape_of(node) is None and node.target in (getattr, operator.getitem, "size", "dim", "numel"):
                continue
            _label_operation(node, at, labels, freeze)
        elif node.op == "get_attr":
            freeze(node, "constant")
    return labels, members, stops


def _label_module(
    net: fx.GraphModule,
    node: fx.Node,
    at: dict[fx.Node, list[int]],
    labels: _Labels,
    attach: Callable[[str, int, list[int]], None],
    freeze: Callable[[fx.Node, str], None],
) -> None:
    module, name = submodule(net, node), str(node.target)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source not in at:
        freeze(node, type(module).__name__)
        return
    incoming, shape = at[source], shape_of(node) or ()
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        attach(name, IN, incoming)
        at[node] = labels.fresh(module.out_channels)
        attach(name, OUT, at[node])
    elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels:
        attach(name, OUT, incoming)
        at[node] = incoming
    elif isinstance(module, nn.Linear) and len(shape) == 2:
        attach(name, IN, incoming)
        at[node] = labels.fresh(module.out_features)
        attach(name, OUT, at[node])
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
        attach(name, NORM, incoming)
        at[node] = incoming
    elif isinstance(module, nn.Flatten) and module.start_dim == 1:
        at[node] = _flattened(incoming, shape)
    elif isinstance(module, _PASS_MODULES) and len(shape) >= 2 and shape[1] == len(incoming):
        at[node] = incoming
    else:
        freeze(node, type(module).__name__)


def _label_operation(
    node: fx.Node, at: dict[fx.Node, list[int]], labels: _Labels, freeze: Callable[[fx.Node, str], None]
) -> None:
    shape = shape_of(node) or ()
    tensors = [a for a in node.args if isinstance(a, fx.Node) and a in at]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.target in _TWO_OPERANDS or node.target in _TWO_METHODS:
        sizes = {len(at[t]) for t in tensors}
        others = [a for a in node.args if isinstance(a, fx.Node) and a not in at and shape_of(a) is not None]
        if tensors and len(sizes) == 1 and not others and all(len(shape_of(t) or ()) == len(shape) for t in tensors):
            for a, b in zip(at[tensors[0]], at[tensors[-1]], strict=True):
                labels.join(a, b)
            at[node] = at[tensors[0]]
            return
    elif node.target in (torch.cat, torch.concat):
        listed = node.args[0] if isinstance(node.args[0], list | tuple) else ()
        parts = [p for p in listed if isinstance(p, fx.Node) and p in at]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim == 1 and parts and len(parts) == len(listed):
            at[node] = [label for p in parts for label in at[p]]
            return
    elif len(tensors) == 1:
        incoming, before = at[tensors[0]], shape_of(tensors[0]) or ()
        if _passes_channels(node, before, shape) and len(shape) >= 2 and shape[1] == len(incoming):
            at[node] = incoming
            return
        if _flattens(node) and len(shape) == 2:
            at[node] = _flattened(incoming, shape)
            return
    freeze(node, str(name))


def _passes_channels(node: fx.Node, before: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if node.target in _PASS_FUNCTIONS or node.target in _PASS_METHODS:
        return True
    if node.target in (torch.mean, "mean"):
        return len(before) == 4 and _spatial(node)
    return node.target is operator.getitem and len(shape) == 4 and _keeps_channels(node.args[1])


def _flattens(node: fx.Node) -> bool:
    if node.target in (torch.flatten, "flatten"):
        return node.args[1:2] == (1,)
    return node.target in ("view", "reshape", torch.reshape) and node.args[-1:] == (-1,)


def _flattened(incoming: list[int], shape: tuple[int, ...]) -> list[int]:
    repeat = shape[1] // len(incoming)
    return [label for label in incoming for _ in range(repeat)]


def _spatial(node: fx.Node) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, list | tuple) else []
    return bool(dims) and {d % 4 for d in dims if isinstance(d, int)} == {2, 3}


def _keeps_channels(index: object) -> bool:
    return isinstance(index, tuple) and len(index) == 4 and index[0] == slice(None) == index[1]


def residual_branches(net: fx.GraphModule) -> dict[str, Block]:
    """Residual branches of a canonical network that end in an addition and hold layers no one else reads, by name."""
    found: dict[str, Block] = {}
    taken: set[fx.Node] = set()
    for node in net.graph.nodes:
        if not is_add(node):
            continue
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b or shape_of(a) != shape_of(b):
            continue
        cones = {x: _exclusive(x, node) for x in (a, b)}
        layers = {x: [n for n in cones[x] if n.op == "call_module" and _is_layer(net, n)] for x in (a, b)}
        branch, shortcut = (a, b) if len(layers[a]) >= len(layers[b]) else (b, a)
        if len(layers[branch]) <= len(layers[shortcut]) or not layers[branch] or shortcut in cones[branch]:
            continue
        if not all(_nameable(net, n) for n in layers[branch]):
            continue  # linear layers on maps: targets cannot name them in their graphs
        if cones[branch] & taken:  # a branch that holds another removable branch would make their removals depend on each other
            continue
        taken |= cones[branch]
        ordered = [str(n.target) for n in net.graph.nodes if n in layers[branch]]
        name = f"block:{ordered[-1]}"
        found[name] = Block(name, node.name, shortcut.name, ordered[-1], tuple(ordered))
    return found


def _nameable(net: fx.GraphModule, node: fx.Node) -> bool:
    """A convolution, or a linear layer on one vector for each image: exported with its weight under its own name."""
    return isinstance(submodule(net, node), nn.Conv2d) or len(shape_of(node) or ()) == 2


def _is_layer(net: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(submodule(net, node), nn.Conv2d | nn.Linear)


def _exclusive(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes that only `end` reads, through `start`."""
    cone: set[fx.Node] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        if node in cone or node.op in ("placeholder", "output", "get_attr"):
            continue
        if all(user in cone or (user is end and node is start) for user in node.users):
            cone.add(node)
            queue.extend(node.all_input_nodes)
    return cone
