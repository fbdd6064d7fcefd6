"""Labels every channel of every tensor with where it comes from.

A convolution makes new labels, element-wise operations pass them on, an addition makes two labels one, a concatenation joins
lists. Two channels with the same label can only be removed together; labels that reach an operation without a rule are frozen.
This is the dependency graph of DepGraph (Fang et al. 2023, arXiv 2301.12900) at the level of single channels instead of layers,
so that shifted and zero-padded shortcuts are coupled channel by channel.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .trace import argument, is_layer, shape_of, submodule

Place = tuple[str, int, int]  # layer, axis of its tensors, position along it

# Element-wise operations: channel i of the result depends on channel i of the operand(s) alone.
_PASS_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.MaxPool2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
_PASS_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.silu, F.gelu, torch.sigmoid, F.sigmoid, torch.tanh,
    F.leaky_relu, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
    F.elu, torch.max_pool2d,
}  # fmt: skip
_PASS_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float", "clamp", "to"}
_SUMS = {operator.add, operator.iadd, torch.add, operator.sub, torch.sub, "add", "add_", "sub"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


@dataclass(frozen=True)
class Stop:
    """An operation that freezes what it reads."""

    operation: str
    module: str
    reason: str


class Labels:
    """The labels of a canonical network whose shapes have been propagated, as a union-find.

    Args:
        net: see `trace.canonical`.
    """

    def __init__(self, net: fx.GraphModule) -> None:
        self._net = net
        self._parent: list[int] = []
        self._frozen: dict[int, Stop] = {}
        self._added: list[int] = []
        self._places: dict[int, list[Place]] = defaultdict(list)
        self.at: dict[fx.Node, list[int]] = {}  # node -> label of each channel (dimension 1)
        self.stops: list[Stop] = []
        for node in net.graph.nodes:
            self._visit(node)

    def root(self, label: int) -> int:
        """The label that stands for all that were joined with this one."""
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def places(self) -> dict[int, list[Place]]:
        """Root -> everything that carries it."""
        found: dict[int, list[Place]] = defaultdict(list)
        for label, attached in self._places.items():
            found[self.root(label)].extend(attached)
        return found

    def frozen(self) -> dict[int, Stop]:
        """Root that cannot be removed -> the first operation that keeps it; the network's input and output come last."""
        found: dict[int, Stop] = {}
        for label, stop in sorted(self._frozen.items(), key=lambda item: item[1].operation in ("placeholder", "output")):
            found.setdefault(self.root(label), stop)
        return found

    def added(self) -> set[int]:
        """Roots whose channels an addition takes from several layers."""
        return {self.root(label) for label in self._added}

    def _fresh(self, count: int) -> list[int]:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return list(range(start, start + count))

    def _attach(self, layer: str, axis: int, channels: list[int]) -> None:
        for position, label in enumerate(channels):
            self._places[label].append((layer, axis, position))

    def _freeze(self, node: fx.Node, reason: str) -> None:
        module, stack = submodule(self._net, node), node.meta.get("nn_module_stack") or {}
        operation = node.op if node.op in ("placeholder", "output") else _name(node) if module is None else type(module).__name__
        where = str(node.target) if module is not None else next(iter(reversed(stack)), "")
        stop = Stop(operation, where, reason)
        labels = [label for source in node.all_input_nodes for label in self.at.get(source, ())]
        if labels:
            self.stops.append(stop)
        shape = shape_of(node)
        if shape is not None and len(shape) >= 2:
            self.at[node] = self._fresh(shape[1])
            labels += self.at[node]
        for label in labels:
            self._frozen.setdefault(label, stop)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._module(node)
        elif node.op in ("call_function", "call_method"):
            if shape_of(node) is not None or node.target not in (getattr, operator.getitem, "size", "dim", "numel"):
                self._operation(node)
        else:
            self._freeze(node, {"placeholder": "the input", "output": "the output"}.get(node.op, "a constant"))

    def _module(self, node: fx.Node) -> None:
        module, name = submodule(self._net, node), str(node.target)
        source, shape = argument(node, 0, "input"), shape_of(node) or ()
        if not isinstance(source, fx.Node) or source not in self.at:
            self._freeze(node, "its input is not one tensor")
            return
        incoming = self.at[source]
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels != 1
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not depthwise:
            self._freeze(node, f"a grouped convolution, groups={module.groups}")
        elif isinstance(module, nn.Linear) and len(shape) != 2:
            self._freeze(node, "a linear layer on tokens or maps")
        elif is_layer(module) and not depthwise:
            self._attach(name, 1, incoming)
            self.at[node] = self._fresh(shape[1])
            self._attach(name, 0, self.at[node])
        elif depthwise or (isinstance(module, _BatchNorm) and len(shape) >= 2):
            self._attach(name, 0, incoming)
            self.at[node] = incoming
        elif isinstance(module, nn.Flatten) and module.start_dim == 1 and len(shape) == 2:
            self.at[node] = _flattened(incoming, shape)
        elif isinstance(module, _PASS_MODULES) and len(shape) >= 2 and shape[1] == len(incoming):
            self.at[node] = incoming
        else:
            self._freeze(node, "no rule for it")

    def _operation(self, node: fx.Node) -> None:
        shape = shape_of(node) or ()
        tensors = [a for a in node.all_input_nodes if a in self.at]
        if node.target in _SUMS or node.target in _PRODUCTS:
            if self._element_wise(node, tensors, shape):
                return
            self._freeze(node, "operands of different shapes")
            return
        if node.target in (torch.cat, torch.concat):
            parts, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
            listed = [p for p in parts if isinstance(p, fx.Node) and p in self.at] if isinstance(parts, list | tuple) else []
            if isinstance(dim, int) and dim % max(len(shape), 1) == 1 and len(listed) == len(parts) > 0:
                self.at[node] = [label for p in listed for label in self.at[p]]
                return
        elif len(tensors) == 1:
            incoming, before = self.at[tensors[0]], shape_of(tensors[0]) or ()
            if _passes_channels(node, before, shape) and len(shape) >= 2 and shape[1] == len(incoming):
                self.at[node] = incoming
                return
            if _flattens(node) and len(shape) == 2:
                self.at[node] = _flattened(incoming, shape)
                return
        self._freeze(node, "no rule for it")

    def _element_wise(self, node: fx.Node, tensors: list[fx.Node], shape: tuple[int, ...]) -> bool:
        others = [a for a in node.all_input_nodes if a not in self.at and shape_of(a) is not None]
        same = len({len(self.at[t]) for t in tensors}) == 1 and all(len(shape_of(t) or ()) == len(shape) for t in tensors)
        if others or not same:
            return False
        for a, b in zip(self.at[tensors[0]], self.at[tensors[-1]], strict=True):
            if node.target in _SUMS and self.root(a) != self.root(b):
                self._added.append(a)
            self._parent[self.root(b)] = self.root(a)
        self.at[node] = self.at[tensors[0]]
        return True


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _passes_channels(node: fx.Node, before: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if node.target in _PASS_FUNCTIONS or node.target in _PASS_METHODS:
        return True
    if node.target in (torch.mean, "mean"):
        return len(before) == 4 and _spatial(node)
    return node.target is operator.getitem and len(shape) == 4 and _keeps_channels(node.args[1])


def _flattens(node: fx.Node) -> bool:
    if node.target in (torch.flatten, "flatten"):
        return bool(argument(node, 1, "start_dim", 0) == 1)
    return node.target in ("view", "reshape", torch.reshape) and node.args[-1:] == (-1,)


def _flattened(incoming: list[int], shape: tuple[int, ...]) -> list[int]:
    repeat = shape[1] // len(incoming)
    return [label for label in incoming for _ in range(repeat)]


def _spatial(node: fx.Node) -> bool:
    dim = argument(node, 1, "dim")
    dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, list | tuple) else []
    return bool(dims) and {d % 4 for d in dims if isinstance(d, int)} == {2, 3}


def _keeps_channels(index: object) -> bool:
    return isinstance(index, tuple) and len(index) == 4 and index[0] == slice(None) == index[1]
