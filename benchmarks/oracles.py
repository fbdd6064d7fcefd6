"""What estimators of curvature and scores of channels try to foretell, computed the slow and certain way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from edge_compress.pipeline.graph.coupling import Coupling
from edge_compress.pipeline.graph.surgery import masked
from edge_compress.pipeline.network.exact_mode import Batch, steady, weight_layers
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.reconstruct.optimal_brain_surgeon import highest
from edge_compress.pipeline.score.curvature import second_difference
from edge_compress.pipeline.score.removal import places_of, read_apart
from edge_compress.pipeline.types import Plan
from torch import Tensor, fx, nn

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


class _Noting(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)


class _Rest(fx.Interpreter):
    """Runs what lies behind some layers, with the values of all other nodes given."""

    def finish(self, known: dict[str, Tensor], layers: set[str]) -> Tensor:
        behind: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            if node.target in layers or any(source in behind for source in node.all_input_nodes):
                behind.add(node)
        given = {n: known[n.name] for n in self.module.graph.nodes if n not in behind and n.name in known}
        logits: Tensor = self.run(initial_env=given)
        return logits


def leave_one_out(
    net: fx.GraphModule, coupling: Coupling, inputs: Tensor, labels: Tensor, tell: Callable[[], None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each image by the dense network, and by the network without each unit of each channel group.

    A unit goes as in the product: zeros at all of its slices (`surgery.masked`), without reconstruction and without BatchNorm
    re-estimation. Layers in front of the unit are computed once for all units.

    Args:
        net: canonical network, eval mode.
        coupling: its groups.
        inputs: (n, C, H, W).
        labels: (n,).
        tell: called after each unit, once for every `CHUNK` images.

    Returns:
        Dense losses (n,), and group -> losses (units, n); float64.
    """
    dense: list[Tensor] = []
    without: dict[str, list[Tensor]] = {name: [] for name in coupling.units}
    with torch.no_grad():
        for x, y in zip(inputs.split(CHUNK), labels.split(CHUNK), strict=True):
            noting = _Noting(net)
            dense.append(F.cross_entropy(noting.run(x).double(), y, reduction="none"))
            known = {node.name: value for node, value in noting.env.items() if node.op != "output"}
            for name, units in coupling.units.items():
                losses = []
                for gone, unit in enumerate(units):
                    kept = tuple(i for i in range(len(units)) if i != gone)
                    rest = _Rest(masked(net, coupling, Plan(Pattern.CHANNEL, "", {name: kept})))
                    logits = rest.finish(known, {part.layer for part in unit.slices})
                    losses.append(F.cross_entropy(logits.double(), y, reduction="none"))
                    tell()
                without[name].append(torch.stack(losses))
    return torch.cat(dense), {name: torch.cat(parts, 1) for name, parts in without.items()}


def logit_changes(net: fx.GraphModule, coupling: Coupling, inputs: Tensor, batch: int = 100) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and to first order by how much each falls when a unit goes: one backward pass for each class.

    Args:
        net: canonical network, eval mode.
        coupling: its groups.
        inputs: (n, C, H, W).
        batch: images in one forward pass.

    Returns:
        Logits (n, classes), and group -> (n, units, classes); float64.
    """
    logits: list[Tensor] = []
    falls: dict[str, list[Tensor]] = {group: [] for group in coupling.units}
    with steady(net) as place:
        places = places_of(coupling.units, place.device)
        for x in inputs.split(batch):
            leaf, along = x.clone().requires_grad_(), dict[str, Tensor]()
            with read_apart(net, places, along):
                found = net(leaf.clone())
            by_class: list[dict[str, Tensor]] = []
            for c in range(found.shape[1]):
                along.update({group: place.new_zeros(len(x), len(units)) for group, units in coupling.units.items()})
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
