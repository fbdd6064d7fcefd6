"""Finds the residual branches of a network that can be removed as a whole, so that their shortcut alone is left."""

from __future__ import annotations

import torch
from torch import fx, nn

from .trace import argument, is_add, is_layer, shape_of, submodule
from .units import Block


def residual_branches(net: fx.GraphModule) -> dict[str, Block]:
    """Removable residual branches of a canonical network by name, see `find_branches`."""
    return find_branches(net)[0]


def find_branches(net: fx.GraphModule) -> tuple[dict[str, Block], dict[str, str]]:
    """Residual branches that can be removed, by name; and the names of those that cannot, each with the reason.

    A branch is what only the addition reads, through one of its operands. Of nested branches the innermost can be removed: if
    both could, the removal of one would depend on the other's. The groups inside are not filled in (see `couple`).
    """
    found: dict[str, Block] = {}
    locked: dict[str, str] = {}
    taken: set[fx.Node] = set()
    order = {node: i for i, node in enumerate(net.graph.nodes)}
    for node in net.graph.nodes:
        if not is_add(node):
            continue
        operands = node.all_input_nodes
        if len(operands) != 2 or shape_of(operands[0]) != shape_of(operands[1]):
            continue
        cones = {x: _read_only_by(node, x, order) for x in operands}
        layers = {x: sorted((n for n in cones[x] if is_layer(submodule(net, n))), key=order.__getitem__) for x in operands}
        branch, shortcut = sorted(operands, key=lambda x: -len(layers[x]))
        if len(layers[branch]) == len(layers[shortcut]) or shortcut in cones[branch]:
            continue
        names = tuple(str(n.target) for n in layers[branch])
        reason = _why_not(net, node, branch, layers[branch], bool(cones[branch] & taken))
        if reason:
            locked[f"block:{names[-1]}"] = reason
            continue
        taken |= cones[branch]
        found[f"block:{names[-1]}"] = Block(f"block:{names[-1]}", names, (), names[-1], node.name, branch.name)
    return found, locked


def _why_not(net: fx.GraphModule, addition: fx.Node, branch: fx.Node, layers: list[fx.Node], nested: bool) -> str:
    if argument(addition, 2, "alpha", 1) != 1:
        return "its addition scales an operand"
    if not all(isinstance(submodule(net, n), nn.Conv2d) or len(shape_of(n) or ()) == 2 for n in layers):
        return "a linear layer on tokens or maps"  # exported without its weight's name: targets cannot find it
    if nested:
        return "it holds another residual branch"
    if not _leads_to(net, layers[-1], branch):
        return "it does not end in one layer"
    return ""


def _leads_to(net: fx.GraphModule, layer: fx.Node, end: fx.Node) -> bool:
    """Whether a layer's output becomes `end` by element-wise operations alone: targets look for the addition from there."""
    queue = [end]
    while queue:
        node = queue.pop()
        if node is layer:
            return True
        module = submodule(net, node)
        if not is_layer(module) and len(shape_of(node) or ()) > 1 and node.target not in (torch.cat, torch.concat):
            queue.extend(node.all_input_nodes)
    return False


def _read_only_by(end: fx.Node, operand: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """Nodes whose values reach nothing but `end`, through `operand`."""
    if set(operand.users) != {end}:
        return set()
    cone, waiting = {operand}, set(operand.all_input_nodes)
    while waiting:  # the latest first: all that reads it has been looked at
        node = max(waiting, key=order.__getitem__)
        waiting.remove(node)
        if node.op not in ("placeholder", "get_attr") and all(user in cone for user in node.users):
            cone.add(node)
            waiting.update(node.all_input_nodes)
    return cone
