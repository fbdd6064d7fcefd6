"""OBS saliency of whole units: what a layer's outputs lose when a unit's inputs go and the others are re-fit.

For a layer with weights W (rows = outputs), the Hessian G of its output error and the columns g of one unit, the loss is
tr(W_g [(G^-1)_gg]^-1 W_g^T) (Optimal Brain Surgeon for a group of weights: Hassibi & Stork 1993; Kurtic et al. 2022,
arXiv 2203.07259). G is centred where the layer has a bias, which is re-fit too. Dimensions that queries and keys share have no
layer that reads them: there it is the energy of their part of the attention scores.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..axes.capture import Captured, operator_name
from ..axes.coupling import Coupling
from ..axes.cutting.scaling import outputs_moved
from ..axes.types import Group
from ..errors import InputError
from ..network.memory import TensorCache
from ..options import Score
from .layer_moments import LayerMoments

DAMPING = 0.01  # share of the mean diagonal added to the diagonal, as in reconstruction
_FACTORS = {"scaled_dot_product_attention": 0, "matmul": 0, "bmm": 0, "baddbmm": 1}  # the first operand of the product


def unit_saliency(coupling: Coupling, moments: LayerMoments, score: str, seed: int) -> dict[str, Tensor]:
    """Group -> saliency of each unit (units,), float64; the lowest go first.

    Args:
        coupling: of the dense network; its open groups are scored.
        moments: of its layers.
        score: "hasa": OBS saliency; "magnitude": norm of all weights that go with the unit; "random".
        seed: of "random".

    Raises:
        InputError: another score.
    """
    groups = coupling.open_groups()
    generator = torch.Generator().manual_seed(seed)
    if score == Score.RANDOM:
        return {g.name: torch.rand(len(g.units), generator=generator, dtype=torch.float64) for g in groups}
    if score == Score.MAGNITUDE:
        squares = {n: p.detach().double().square() for n, p in moments.module.named_parameters() if p.ndim > 1}
        return {g.name: _sums(g, squares) for g in groups}
    if score != Score.HASA:
        raise InputError(
            f"--score {score}",
            expected="hasa, magnitude or random: this network's units are scored layer by layer, by OBS saliency",
        )
    inverses: TensorCache[str, tuple[Tensor, Tensor]] = TensorCache(moments.memory_bytes // 4)
    return {g.name: _obs(g, coupling, moments, inverses) for g in groups}


def _obs(group: Group, coupling: Coupling, moments: LayerMoments, inverses: TensorCache[str, tuple[Tensor, Tensor]]) -> Tensor:
    found = torch.zeros(len(group.units), dtype=torch.float64)
    read: dict[str, list[tuple[int, tuple[int, ...]]]] = {}  # weight -> units and the inputs they are; one inverse at a time
    for number, unit in enumerate(group.units):
        for part in unit.slices:
            if part.axis == 1 and part.parameter in moments.gram:
                read.setdefault(part.parameter, []).append((number, tuple(part.indices)))
    for name, units in read.items():
        weight = moments.module.get_parameter(name).detach()
        inverse, energy = inverses.get(name, partial(_inverse, moments.gram, name, weight))
        area = weight[0, 0].numel()
        for number, indices in units:
            columns = (torch.tensor(indices)[:, None] * area + torch.arange(area)).flatten()
            own = weight.flatten(1)[:, columns].double()
            solved = torch.linalg.solve(inverse[columns][:, columns], own.T)
            found[number] += (own.T * solved).sum() / energy
    if group.kind == "head_dim":
        found += _shares(group, coupling, moments.energy)
    if not found.any():  # nothing reads the units: what they weigh
        squares = {n: p.detach().double().square() for n, p in moments.module.named_parameters() if p.ndim > 1}
        return _sums(group, squares)
    return found


def _inverse(grams: Mapping[str, Tensor], name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of the centred, damped Hessian, and the energy of the layer's outputs that depends on its inputs."""
    gram = grams[name]
    count = gram[-1, -1].clamp_min(1.0)
    mean = gram[-1, :-1] / count
    centred = gram[:-1, :-1] - count * torch.outer(mean, mean)
    flat = weight.flatten(1).double()
    energy = (flat @ centred * flat).sum().clamp_min(1e-30)
    ridge = DAMPING * centred.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.inv(centred + ridge * torch.eye(len(centred), dtype=centred.dtype)), energy


def _shares(group: Group, coupling: Coupling, energy: Mapping[str, Tensor]) -> Tensor:
    """Each dimension's share of the energy of the attention scores: squares of queries times squares of keys, of all heads."""
    found = torch.zeros(len(group.units), dtype=torch.float64)
    rows = [[(s.parameter, i) for s in unit.slices if s.axis == 0 for i in s.indices] for unit in group.units]
    weights = {name for unit in rows for name, _ in unit} & energy.keys()
    for pair in _queries_and_keys(group, coupling):
        queries, keys = (_rows_read(operand, coupling.walk.captured, weights) for operand in pair)
        for number, own in enumerate(rows):
            found[number] += sum(energy[n][i] for n, i in own if (n, i) in queries) * sum(
                energy[n][i] for n, i in own if (n, i) in keys
            )
    return found / found.sum().clamp_min(1e-30)


def _queries_and_keys(group: Group, coupling: Coupling) -> list[list[fx.Node]]:
    """The two factors of every product that sums over a group's dimensions."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in (cost.node for cost in coupling.walk.costs):
        name = operator_name(node)
        given: Any = node.args[1] if name == "einsum" else ()
        if name in _FACTORS:
            given = node.args[_FACTORS[name] : _FACTORS[name] + 2]
        factors = [a for a in given if isinstance(a, fx.Node) and group.name in coupling.groups_of(coupling.walk.axes(a))]
        left = group.name in coupling.groups_of(coupling.walk.axes(node))
        if len(factors) == 2 and (not left or name == "scaled_dot_product_attention"):  # its values may have the dimensions too
            found[node] = factors
    return list(found.values())


def _rows_read(value: fx.Node, captured: Captured, weights: Collection[str]) -> set[tuple[str, int]]:
    """The rows, as (weight, row), that a value is computed from, through whatever lies between."""
    before, queue = set[fx.Node](), [value]
    while queue:
        node = queue.pop()
        if node not in before:
            before.add(node)
            queue += node.all_input_nodes
    found = set[tuple[str, int]]()
    for node in before:
        name = captured.names.get(node.name)
        for layer in node.users.keys() & before if name in weights else ():
            moved = outputs_moved(layer, -1 if operator_name(layer) == "linear" else 1)
            read = [rows for n, rows in moved.items() if n is value or (n.users.keys() & before) - moved.keys()]
            found |= {(str(name), row) for row in frozenset().union(*read)}
    return found


def _sums(group: Group, squares: Mapping[str, Tensor]) -> Tensor:
    totals: dict[tuple[str, int], Tensor] = {}
    found = torch.zeros(len(group.units), dtype=torch.float64)
    for number, unit in enumerate(group.units):
        for part in unit.slices:
            if part.parameter in squares:
                key = part.parameter, part.axis
                if key not in totals:
                    totals[key] = squares[part.parameter].transpose(0, part.axis).flatten(1).sum(1)
                found[number] += totals[key][list(part.indices)].sum()
    return found
