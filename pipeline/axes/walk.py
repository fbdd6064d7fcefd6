"""One walk over a captured graph: every axis of every tensor gets its labels, operator by operator.

A rule is looked up by the operator's name; an operator without one keeps whatever reaches it in the network, with its name as the
reason. Rules live in `rules/`, by family.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .algebra import Axis, Store, fixed, labelled
from .capture import Captured, operator_name, owner
from .cutting.scaling import Rescale

Axes = list[Axis]
Value = Axes | list[Axes]  # a tensor, or an operator's several results
Rule = Callable[["Walk", fx.Node], Value]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the ATen operators of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def _is_view(node: fx.Node) -> bool:
    """Whether an operator's result shares the memory of its first argument."""
    if node.op != "call_function" or not node.args:
        return False
    if node.target is operator.getitem:
        return True
    returns: list[Any] = list(getattr(getattr(node.target, "_schema", None), "returns", ()))
    return bool(returns) and returns[0].alias_info is not None


def _writes(node: fx.Node) -> bool:
    """Whether an operator changes its first argument in place."""
    arguments: list[Any] = list(getattr(getattr(node.target, "_schema", None), "arguments", ()))
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


def number(value: Any) -> int:
    """A whole number among an operator's arguments."""
    return int(value)


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one operator, and the axes of which it gets cheaper."""

    node: fx.Node
    macs: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Count:
    """An attribute of a module that counts the positions of an axis."""

    module: str
    attribute: str
    axis: Axis


@dataclass
class Walk:
    """Labels of a network's tensors as far as the walk has come."""

    captured: Captured
    store: Store = field(default_factory=Store)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    parameters: dict[str, Axes] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    rescales: list[Rescale] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    _bound: dict[fx.Node, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Walk:
        """Walk the whole graph."""
        live = self._live()
        for node in self.captured.graph.nodes:
            self.store.muted = node not in live
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.freeze(source, "output of the network")
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            else:
                self.values[node] = [fixed(n) for n in self.shape(node)]
        return self

    def _live(self) -> set[fx.Node]:
        """The nodes an output depends on; what is written in place into a tensor, through any view of it, is of the tensor."""
        nodes = list(self.captured.graph.nodes)
        memory: dict[fx.Node, fx.Node] = {}  # node -> the node that made the tensor it is a view of
        writers: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            memory[node] = memory[node.args[0]] if _is_view(node) and isinstance(node.args[0], fx.Node) else node
            if _writes(node):
                writers.setdefault(memory[node], []).append(node)
        queue = [n for n in nodes if n.op == "output"]
        live: set[fx.Node] = set()
        while queue:
            node = queue.pop()
            if node not in live:
                live.add(node)
                queue += [*node.all_input_nodes, *writers.get(memory[node], ())]
        return live

    def axes(self, node: Any) -> Axes:
        """The axes of a node's tensor."""
        value = self.values[node]
        return value  # type: ignore[return-value]

    def shape(self, node: Any) -> tuple[int, ...]:
        """Returns the shape of a node's tensor; () where its value is not a tensor."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()

    def argument(self, node: fx.Node, name: str, default: Any = None) -> Any:
        """An operator's argument by the name it has in its schema."""
        if node not in self._bound:
            schema = node.target._schema  # type: ignore[union-attr]
            bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
            bound.update({a.name: v for a, v in zip(schema.arguments, node.args, strict=False)})
            self._bound[node] = bound | dict(node.kwargs)
        found = self._bound[node].get(name)
        return default if found is None else found

    def why(self, node: fx.Node) -> str:
        """A reason that names an operator and where it is."""
        name = owner(node)[0]
        return f"{operator_name(node)} in {name}" if name else operator_name(node)

    def freeze(self, node: fx.Node, reason: str) -> None:
        """Keep everything in a node's result."""
        value = self.values.get(node, [])
        for item in value:
            for axis in [item] if isinstance(item, tuple) else item:
                self.store.freeze(axis, reason)

    def join(self, a: Axis, b: Axis, node: fx.Node) -> Axis:
        """Two axes as element-wise operators see them: one of size 1 is repeated along the other."""
        if not a or not b:
            return a or b
        return self.store.join(a, b, self.why(node))

    def broadcast(self, tensors: Sequence[Axes], node: fx.Node) -> Axes:
        """The axes of an element-wise result."""
        rank = max((len(t) for t in tensors), default=0)
        result: Axes = [() for _ in range(rank)]
        for tensor in tensors:
            for k, axis in enumerate(tensor, start=rank - len(tensor)):
                result[k] = self.join(result[k], axis, node)
        return result

    def cost(self, node: fx.Node, macs: int, *axes: Axis) -> None:
        """Note what an operator costs and which axes make it cheaper."""
        self.costs.append(Cost(node, macs, axes))

    def count(self, node: fx.Node, axis: Axis, *attributes: str) -> None:
        """Note that attributes of these names, where the calling module has them, count an axis."""
        if labelled(axis):
            self.counts += [Count(owner(node)[0], attribute, axis) for attribute in attributes]

    def opaque(self, node: fx.Node, reason: str | None = None) -> Value:
        """Keep what reaches an operator that is not understood; its result has nothing to remove."""
        for source in node.all_input_nodes:
            self.freeze(source, reason or self.why(node))
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            return [[fixed(int(n)) for n in getattr(v, "shape", ())] for v in value]
        return [fixed(n) for n in self.shape(node)]

    def _placeholder(self, node: fx.Node) -> Axes:
        name = self.captured.names.get(node.name)
        if name is None:
            return [fixed(n) for n in self.shape(node)]
        if name not in self.parameters:
            self.parameters[name] = [self.store.fresh(n) for n in self.shape(node)]
        return self.parameters[name]

    def _call(self, node: fx.Node) -> Value:
        name = operator_name(node)
        found = RULES.get(name)
        if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            found = RULES["pointwise"]
        if found is None:
            if any(labelled(a) for s in node.all_input_nodes for a in self._flat(s)):
                self.unknown[name] = self.unknown.get(name, 0) + 1
            return self.opaque(node)
        return found(self, node)

    def _flat(self, node: fx.Node) -> Axes:
        value = self.values.get(node, [])
        return [axis for item in value for axis in ([item] if isinstance(item, tuple) else item)]
