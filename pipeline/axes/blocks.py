"""Residual branches that can be left out whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from .capture import Captured, operator_name, owner, stack
from .types import Block

if TYPE_CHECKING:
    from .coupling import Coupling


def residual_blocks(captured: Captured, coupling: Coupling) -> tuple[Block, ...]:
    """Residual branches, added to their input or to a projection of it, whose operators nothing else reads."""
    costs = {cost.node: k for k, cost in enumerate(coupling.walk.costs)}
    scopes = _scopes(captured)
    touched: dict[str, set[str]] = {}
    for group in coupling.groups:
        touched[group.name] = {s.parameter for s in group.units[0].slices}
    order = {node: k for k, node in enumerate(captured.graph.nodes)}
    stored = {node for node in order if node.op == "placeholder" and node.name in captured.names}
    found: list[Block] = []
    taken: set[fx.Node] = set()
    for node in captured.graph.nodes:
        if operator_name(node) != "add" or len(node.all_input_nodes) != 2 or node.kwargs.get("alpha", 1) != 1:
            continue
        a, b = node.all_input_nodes
        if coupling.walk.shape(a) != coupling.walk.shape(b):
            continue
        cones = {x: _exclusive(x, node) for x in (a, b)}
        layers = {x: [n for n in cones[x] if n in costs] for x in (a, b)}
        branch, shortcut = (a, b) if len(layers[a]) >= len(layers[b]) else (b, a)
        if len(layers[branch]) <= len(layers[shortcut]) or shortcut in cones[branch] or cones[branch] & taken:
            continue
        starts = _feeds(cones[shortcut]) if cones[shortcut] else {shortcut}
        if not starts & _feeds(cones[branch]):  # without the branch the identity is left, or a projection
            continue
        modules = _only_in(cones[branch], scopes, order)
        taken |= cones[branch]
        inside = {
            captured.names[p.name]
            for n in cones[branch]
            for p in n.all_input_nodes
            if p in stored and set(p.users) <= cones[branch]
        }
        groups = tuple(g for g, where in touched.items() if where and where <= inside)
        last = max(layers[branch], key=lambda n: order[n])
        operators = tuple(sorted(costs[n] for n in layers[branch]))
        end = max(scopes[modules[-1]], key=lambda n: order[n]) if modules else None
        given = _given(scopes[modules[-1]], order, stored) if modules else None
        shape: tuple[int, ...] = ()
        if end is not None and given is not None and coupling.walk.shape(end)[:1] == coupling.walk.shape(given)[:1]:
            shape = coupling.walk.shape(end)[1:]  # axis 0 is that of the samples, or of windows of them, before and after
        name, ending = f"block:{owner(last)[0]}", "" if end is None else end.name
        found.append(Block(name, modules, groups, branch.name, operators, shape=shape, end=ending))
    return tuple(found)


def _scopes(captured: Captured) -> dict[str, set[fx.Node]]:
    """Module -> all operators that it or a module in it calls."""
    found: dict[str, set[fx.Node]] = {}
    for node in captured.graph.nodes:
        if node.op == "call_function":
            for name in stack(node):
                found.setdefault(name, set()).add(node)
    return found


def _given(inside: set[fx.Node], order: dict[fx.Node, int], stored: set[fx.Node]) -> fx.Node | None:
    """The first value from outside that a module's operators read, other than parameters and buffers."""
    for node in sorted(inside, key=order.__getitem__):
        for source in node.all_input_nodes:
            if source not in inside and source not in stored:
                return source
    return None


def _only_in(cone: set[fx.Node], scopes: dict[str, set[fx.Node]], order: dict[fx.Node, int]) -> tuple[str, ...]:
    """The outermost modules all of whose operators lie in a branch, in the order they end."""
    own = {name: max(order[n] for n in nodes) for name, nodes in scopes.items() if nodes <= cone}
    outer = [name for name in own if not any(name.startswith(f"{other}.") for other in own)]
    return tuple(sorted(outer, key=own.__getitem__))


def _feeds(cone: set[fx.Node]) -> set[fx.Node]:
    return {s for n in cone for s in n.all_input_nodes if s not in cone and s.op == "call_function"}


def _exclusive(start: fx.Node, end: fx.Node) -> set[fx.Node]:
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
