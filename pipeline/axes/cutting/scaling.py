"""Operators that divide by the number of units: when some go, a parameter takes up the difference.

Fused attention divides by the root of the dimensions of a head, which the queries' projection takes up. Global response
normalisation (Woo et al. 2023, ConvNeXt V2, section 3) divides by a mean over the channels, which its own weight takes up.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from ..algebra import Axis

if TYPE_CHECKING:
    from ..coupling import Coupling

_MOVES = {
    "view", "reshape", "permute", "transpose", "select", "unbind", "chunk", "split", "unflatten", "contiguous", "clone", 
    "squeeze", "unsqueeze", "flatten", "slice", "split_with_sizes", "alias", "detach",
}  # fmt: skip


@dataclass(frozen=True)
class Rescale:
    """Rows of parameters to multiply by (units left / units before) ** power; no rows: all of them."""

    parameters: tuple[str, ...]
    rows: tuple[int, ...]
    axis: Axis
    power: float


def rescale_of(query: fx.Node, names: Mapping[str, str], depth: Axis) -> Rescale | None:
    """The rows of the linear layer that makes the queries, or None where anything else than reshapes lies between."""
    chain: list[fx.Node] = []
    node = query
    while node.target is not torch.ops.aten.linear.default:
        name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1]
        if node.target is not operator.getitem and name not in _MOVES:
            return None
        chain.append(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    parameters = [a for a in node.args[1:] if isinstance(a, fx.Node)]
    if any(p.name not in names or len(p.users) > 1 for p in parameters):
        return None
    shape = node.meta["val"].shape
    value = torch.arange(shape[-1]).expand(tuple(int(n) for n in shape))
    for step in reversed(chain):
        value = step.target(value, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    return Rescale(tuple(names[p.name] for p in parameters), tuple(np.unique(value.numpy()).tolist()), depth, 0.5)


def response_rescale_of(mean: fx.Node, names: Mapping[str, str], channels: Axis) -> Rescale | None:
    """The weight of a global response normalisation x + weight * (x * norm / (mean(norm) + eps)) + bias.

    None where the mean over the channels is used in any other way. The small `eps` is left as it is.
    """
    node, found = mean, list[fx.Node]()
    for name in ("add", "div", "mul"):
        users = list(node.users)
        if len(users) != 1 or _operator(users[0]) != name or (name == "div" and users[0].args[1] is not node):
            return None
        if name == "add" and isinstance(users[0].args[1], fx.Node):
            return None
        node = users[0]
    for user in node.users:
        others = [_source(a) for a in user.args[:3] if isinstance(a, fx.Node) and a is not node]
        name = _operator(user)
        weights = others[:1] if name == "mul" else others[1:] if name == "addcmul" and user.args[0] is not node else []
        found += [w for w in weights if w.name in names and _only_use(w)]
    if len(found) != 1 or len(node.users) != 1:
        return None
    return Rescale((names[found[0].name],), (), channels, -1.0)


def _operator(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", "")).split("::")[-1].removesuffix("_")


def _source(node: fx.Node) -> fx.Node:
    """What a chain of reshapes starts from."""
    while _operator(node) in _MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _only_use(node: fx.Node) -> bool:
    while len(node.users) == 1 and _operator(next(iter(node.users))) in _MOVES:
        node = next(iter(node.users))
    return len(node.users) == 1


def rescale(module: nn.Module, coupling: Coupling, gone: NDArray[np.bool_]) -> nn.Module:
    """Multiply, in a module of the full size that is the caller's to change, what a plan's missing units ask for."""
    for item in coupling.walk.rescales:
        mask = coupling.kept(item.axis, gone)
        if mask.all():
            continue
        factor = float(mask.mean() ** item.power)
        with torch.no_grad():
            for name in item.parameters:
                holder, _, tensor = name.rpartition(".")
                rows = list(item.rows) if item.rows else slice(None)
                getattr(module.get_submodule(holder), tensor)[rows] *= factor
    return module


def needs_rescale(coupling: Coupling, gone: NDArray[np.bool_]) -> bool:
    """Whether a plan removes units by whose number an operator divides."""
    return any(not coupling.kept(item.axis, gone).all() for item in coupling.walk.rescales)
