"""Fused attention divides by the root of its dimensions: when some go, the queries' projection takes up the difference."""

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
    """Rows of a parameter to multiply by the root of (dimensions left / dimensions before)."""

    parameters: tuple[str, ...]
    rows: tuple[int, ...]
    depth: Axis


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
    return Rescale(tuple(names[p.name] for p in parameters), tuple(np.unique(value.numpy()).tolist()), depth)


def rescale(module: nn.Module, coupling: Coupling, gone: NDArray[np.bool_]) -> nn.Module:
    """Multiply, in a module of the full size that is the caller's to change, what a plan's missing dimensions ask for."""
    for item in coupling.walk.rescales:
        mask = coupling.kept(item.depth, gone)
        if mask.all():
            continue
        factor = float(np.sqrt(mask.mean()))
        with torch.no_grad():
            for name in item.parameters:
                holder, _, tensor = name.rpartition(".")
                getattr(module.get_submodule(holder), tensor)[list(item.rows)] *= factor
    return module


def needs_rescale(coupling: Coupling, gone: NDArray[np.bool_]) -> bool:
    """Whether a plan removes dimensions that fused attention divides by."""
    return any(not coupling.kept(item.depth, gone).all() for item in coupling.walk.rescales)
