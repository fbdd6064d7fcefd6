"""Operators that divide by the number of units: when some are removed, the factor is folded into a parameter.

Fused attention divides by the root of the head dimension; its factor goes into the query projection, or into that of the keys.
Global response normalisation (GRN; Woo et al. 2023, ConvNeXt V2, section 3) divides by a mean over the channels, and RMSNorm
(Zhang and Sennrich 2019, equation 4) by the root of one; their factors go into their own weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from ..algebra import Axis
from ..capture import operator_name, owner, tensors_in

if TYPE_CHECKING:
    from ..coupling import Coupling

MOVES = {
    "getitem", "view", "reshape", "permute", "transpose", "select", "unbind", "chunk", "split", "unflatten", "contiguous",
    "clone", "squeeze", "unsqueeze", "flatten", "slice", "split_with_sizes", "alias", "detach",
}  # fmt: skip
CASTS = ("to", "_to_copy")
_EPSILONS = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps")


@dataclass(frozen=True)
class Rescale:
    """Rows of parameters to multiply by (units left / units before) ** power; no rows: all of them.

    With an `offset`, the parameter plus that number is multiplied (a weight that is 0 where others are 1). A normalisation's
    `epsilon`, an attribute of its module, is divided by (units left / units before).
    """

    parameters: tuple[str, ...]
    rows: tuple[int, ...]
    axis: Axis
    power: float
    module: str = ""
    epsilon: float | None = None
    offset: float = 0.0


def rescale_of(query: fx.Node, names: Mapping[str, str], depth: Axis) -> Rescale | None:
    """The rows of the linear layer that makes the queries of fused attention, or else those that make its keys.

    Nothing but reshapes lies between, and nothing else reads them, such as a bias computed from the queries. None: neither.
    """
    readers = [user for user in query.users if operator_name(user) == "scaled_dot_product_attention" and user.args[0] is query]
    for operand in (0, 1):
        found = _read_only_by(readers[0], operand, names) if len(readers) == 1 else None
        if found is not None:
            return Rescale(*found, depth, 0.5)
    return None


def _read_only_by(reader: fx.Node, operand: int, names: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """The parameters and rows of the linear layer whose outputs an operand is; None where anything else reads these rows."""
    layer = reader.args[operand]
    while isinstance(layer, fx.Node) and operator_name(layer) in MOVES:
        layer = layer.args[0]
    if not isinstance(layer, fx.Node) or layer.target is not torch.ops.aten.linear.default:
        return None
    parameters = [a for a in layer.args[1:] if isinstance(a, fx.Node)]
    if any(p.name not in names or len(p.users) > 1 for p in parameters):
        return None
    moved = outputs_moved(layer, -1)
    rows = moved[reader.args[operand]]  # type: ignore[index]
    for source, outputs in moved.items():
        for user in source.users.keys() - moved.keys():
            places = [k for k, a in enumerate(user.args) if a is source]
            expected = user is reader and places == [operand] and source not in user.kwargs.values()
            if not expected and operator_name(user) != "_assert_tensor_metadata" and outputs & rows:
                return None
    return tuple(names[p.name] for p in parameters), tuple(sorted(rows))


def outputs_moved(layer: fx.Node, axis: int) -> dict[fx.Node, frozenset[int]]:
    """Which of a layer's outputs, along `axis` of its result, are in that result and in every value that reshapes make of it."""
    shape = tuple(int(n) for n in layer.meta["val"].shape)
    numbers = torch.arange(shape[axis], dtype=torch.int32)
    values: dict[fx.Node, Any] = {layer: numbers.view(-1, *[1] * (len(shape) - 1)).movedim(0, axis).expand(shape)}
    queue = [layer]
    while queue:
        source = queue.pop()
        for user in source.users:
            if operator_name(user) in MOVES and user.args[0] is source:
                values[user] = user.target(values[source], *user.args[1:], **user.kwargs)  # type: ignore[operator]
                queue.append(user)
    return {node: frozenset().union(*map(_numbers, tensors_in(value))) for node, value in values.items()}


def _numbers(value: torch.Tensor) -> frozenset[int]:
    """What is in a tensor of numbers, each read once along the axes that only repeat it."""
    once = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
    return frozenset(np.unique(once.numpy()).tolist())


_NORMALISATIONS = {("add", "div", "mul"): -1.0, ("add", "rsqrt", "mul"): -0.5}  # from a mean to what the weight multiplies


def mean_rescale_of(mean: fx.Node, names: Mapping[str, str], channels: Axis) -> Rescale | None:
    """The weight of a GRN or an RMSNorm that is written out in primitive operators.

    GRN: weight * (x * norm / (mean(norm) + eps)) + bias. RMSNorm: weight * (x * rsqrt(mean(x^2) + eps)). None where the mean
    over the channels is used in any other way.
    """
    first = _only_user(mean)
    epsilon = first.args[1] if first is not None and len(first.args) > 1 else None
    for steps, power in _NORMALISATIONS.items():
        node: fx.Node | None = mean
        for step in steps:
            node = None if node is None else _next(node, step)
        found = None if node is None else _weight_of(node, names)
        if found is not None:
            return Rescale((found[0],), (), channels, power, owner(mean)[0], _number(epsilon), found[1])
    return None


def norm_rescale_of(node: fx.Node, weight: object, epsilon: object, names: Mapping[str, str], channels: Axis) -> Rescale | None:
    """The weight of a fused RMSNorm; None where it has none, or shares it."""
    if not isinstance(weight, fx.Node) or weight.name not in names or len(weight.users) != 1:
        return None
    return Rescale((names[weight.name],), (), channels, -0.5, owner(node)[0], _number(epsilon))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    """The user of a node's value, if there is one; assertions on its type or shape do not use it."""
    users = [user for user in node.users if user.users or operator_name(user) != "_assert_tensor_metadata"]
    return users[0] if len(users) == 1 else None


def _next(node: fx.Node, name: str) -> fx.Node | None:
    """The only user of a node, if it is the step of a normalisation of that name."""
    user = _only_user(node)
    if user is None or operator_name(user) != name:
        return None
    if name == "add":
        return None if isinstance(user.args[1], fx.Node) else user
    return user if name != "div" or user.args[1] is node else None


def _weight_of(node: fx.Node, names: Mapping[str, str]) -> tuple[str, float] | None:
    """The parameter that a node is multiplied by and that has no other use, and what is added to it before."""
    while (user := _only_user(node)) is not None and operator_name(user) in CASTS:
        node = user
    if user is None:
        return None
    others = [_source(a) for a in user.args[:3] if isinstance(a, fx.Node) and a is not node]
    name = operator_name(user)
    weights = others[:1] if name == "mul" else others[1:] if name == "addcmul" and user.args[0] is not node else []
    found = []
    for weight in weights:
        offset = _number(weight.args[1]) if operator_name(weight) == "add" else None
        parameter = weight if offset is None else _source(weight.args[0])  # type: ignore[arg-type]
        if parameter.name in names and _only_use(parameter):
            found.append((names[parameter.name], offset or 0.0))
    return found[0] if len(found) == 1 else None


def _source(node: fx.Node) -> fx.Node:
    """What a chain of reshapes and casts starts from."""
    while operator_name(node) in (*MOVES, *CASTS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _only_use(node: fx.Node) -> bool:
    while (user := _only_user(node)) is not None and operator_name(user) in (*MOVES, *CASTS):
        node = user
    return user is not None


def rescale(module: nn.Module, coupling: Coupling, gone: NDArray[np.bool_]) -> nn.Module:
    """Multiply, in a module of the full size that is the caller's to change, what a plan's missing units ask for."""
    for item in coupling.walk.rescales:
        mask = coupling.kept(item.axis, gone)
        if mask.all():
            continue
        share = float(mask.mean())
        factor = share**item.power
        if item.epsilon is not None:
            _set_epsilon(module.get_submodule(item.module), item.epsilon, item.epsilon / share)
        with torch.no_grad():
            for name in item.parameters:
                holder, _, tensor = name.rpartition(".")
                rows = list(item.rows) if item.rows else slice(None)
                chosen = getattr(module.get_submodule(holder), tensor)
                chosen[rows] = (chosen[rows] + item.offset) * factor - item.offset
    return module


def _set_epsilon(part: nn.Module, before: float, after: float) -> None:
    for name in _EPSILONS:
        if isinstance(found := getattr(part, name, None), float) and found == before:
            setattr(part, name, after)


def needs_rescale(coupling: Coupling, gone: NDArray[np.bool_]) -> bool:
    """Whether a plan removes units by whose number an operator divides."""
    return any(not coupling.kept(item.axis, gone).all() for item in coupling.walk.rescales)
