"""What estimators of curvature and scores of channels try to foretell, computed the slow and certain way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from classifier import units_of
from edge_compress.pipeline.axes.coupling import Coupling
from edge_compress.pipeline.axes.cutting.surgery import zeroed
from edge_compress.pipeline.axes.program import Program
from edge_compress.pipeline.network.exact_mode import Batch, steady, weight_layers
from edge_compress.pipeline.reconstruct.optimal_brain_surgeon import highest
from edge_compress.pipeline.score.removal import places_of, read_apart
from finite_differences import second_difference
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

CHUNK = 500  # images whose activations of all layers are held at a time


def second_differences(net: nn.Module, batch: Batch, step: float = 1e-4) -> dict[str, Tensor]:
    """The second difference of the mean loss for every connection: layer -> curvature of the weight's shape.

    Two forward passes a connection (and one for the middle), for float64 networks of a few hundred weights.
    """

    def loss(module: nn.Module) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    found = {}
    for name, layer in weight_layers(net).items():
        values = [second_difference(net, loss, name, index, step) for index in np.ndindex(*layer.weight.shape)]
        found[name] = torch.tensor(values, dtype=torch.float64).view(layer.weight.shape)
    return found


def exact_gauss_newton(net: nn.Module, inputs: Tensor, tell: Callable[[], None]) -> dict[str, Tensor]:
    """The Gauss-Newton diagonal without sampling: layer -> curvature of the weight's shape.

    The mean over images of `sum_c p_c J_c^2 - (sum_c p_c J_c)^2` with J_c the gradient of logit c (Martens 2020, section 9); one
    backward pass for each image and class. Gradients of log p_c are taken instead of J_c: the second term is then zero.

    Args:
        net: gives logits (N, classes), eval mode.
        inputs: (n, C, H, W).
        tell: called after each image.
    """
    names = {f"{name}.weight": name for name in weight_layers(net)}
    weights = {key: net.get_parameter(key).detach() for key in names}
    total = {name: torch.zeros_like(weights[key]) for key, name in names.items()}

    def log_shares(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(net, weights, (image[None],))
        return logits.log_softmax(1)[0]

    for image in inputs:
        shares = log_shares(weights, image).detach().exp()  # (classes,)
        for key, gradient in torch.func.jacrev(log_shares)(weights, image).items():  # (classes, *weight)
            total[names[key]] += torch.einsum("c,c...->...", shares, gradient.detach().square())
        tell()
    return {name: value / len(inputs) for name, value in total.items()}


def _behind(program: Program, parameters: Collection[str]) -> set[fx.Node]:
    """The operators that depend on any of some parameters or buffers."""
    found: set[fx.Node] = set()
    for node in program.nodes:
        if program.stored(node) in parameters or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _copied(value: Any) -> Any:
    """A node's value that operators in place cannot reach."""
    return pytree.tree_map_only(Tensor, torch.clone, value)


def leave_one_out(
    coupling: Coupling, inputs: Tensor, labels: Tensor, tell: Callable[[], None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each image by the dense network, and by the network without each unit of each group.

    A unit goes as in the product: zeros at all of its slices (`surgery.zeroed`), without reconstruction and without BatchNorm
    re-estimation. Layers in front of the unit are computed once for all units.

    Args:
        coupling: of the captured network.
        inputs: (n, C, H, W).
        labels: (n,).
        tell: called after each unit, once for every `CHUNK` images.

    Returns:
        Dense losses (n,), and group -> losses (units, n); float64.
    """
    groups = units_of(coupling)
    dense: list[Tensor] = []
    without: dict[str, list[Tensor]] = {name: [] for name in groups}
    with torch.no_grad():
        for x, y in zip(inputs.split(CHUNK), labels.split(CHUNK), strict=True):
            whole = Program.of(coupling.walk.captured.module, x)
            *nodes, _ = whole.nodes
            known: dict[fx.Node, Any] = {}
            for k, node in enumerate(nodes):
                value = whole.value(node)
                if whole.stored(node) is None:
                    known[node] = _copied(value)
                whole.drop(k)
            dense.append(F.cross_entropy(whole.outputs()[0].double(), y, reduction="none"))
            for name, units in groups.items():
                behind = _behind(whole, {part.parameter for unit in units for part in unit.slices})
                edge = {n: value for n, value in known.items() if n not in behind and not behind.isdisjoint(n.users)}
                losses = []
                for gone in range(len(units)):
                    rest = Program(zeroed(coupling, {name: [gone]}), whole.captured)
                    rest.env = {node: _copied(value) for node, value in edge.items()}
                    for node in nodes:  # in their order, which operators in place rely on
                        if node in behind:
                            rest.value(node)
                    losses.append(F.cross_entropy(rest.outputs()[0].double(), y, reduction="none"))
                    tell()
                without[name].append(torch.stack(losses))
    return torch.cat(dense), {name: torch.cat(parts, 1) for name, parts in without.items()}


def logit_changes(coupling: Coupling, inputs: Tensor, batch: int = 100) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and to first order by how much each falls when a unit goes: one backward pass for each class.

    Args:
        coupling: of the captured network.
        inputs: (n, C, H, W).
        batch: images in one forward pass.

    Returns:
        Logits (n, classes), and group -> (n, units, classes); float64.
    """
    net, groups = coupling.walk.captured.module, units_of(coupling)
    logits: list[Tensor] = []
    falls: dict[str, list[Tensor]] = {group: [] for group in groups}
    with steady(net) as place:
        places = places_of(net, groups, place.device)
        for x in inputs.split(batch):
            leaf, along = x.clone().requires_grad_(), dict[str, Tensor]()
            with read_apart(net, places, along):
                found = net(leaf.clone())
            by_class: list[dict[str, Tensor]] = []
            for c in range(found.shape[1]):
                along.update({group: place.new_zeros(len(x), len(units)) for group, units in groups.items()})
                torch.autograd.grad(found[:, c].sum(), leaf, retain_graph=True)
                by_class.append(dict(along))
            logits.append(found.detach().double())
            for group, parts in falls.items():
                parts.append(torch.stack([values[group] for values in by_class], 2).double())
    return torch.cat(logits), {group: torch.cat(parts) for group, parts in falls.items()}


def dearest(costs: Mapping[str, Tensor], density: float) -> dict[str, int]:
    """How many connections each layer keeps when those dearest to remove stay, wherever they are.

    Args:
        costs: layer -> (outputs, k), in one currency.
        density: share of all connections that stays.
    """
    joined = torch.cat([c.flatten() for c in costs.values()])
    stays = highest(joined, round(density * len(joined)))
    parts = torch.split(stays, [c.numel() for c in costs.values()])
    return {name: int(part.sum()) for name, part in zip(costs, parts, strict=True)}
