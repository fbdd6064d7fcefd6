"""Which units of a group matter, by score, with lambda tuned on the search split."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, fx, nn

from ..graph.coupling import Coupling
from ..graph.knobs import plan_for
from ..network.compute import CPU, Compute
from ..network.memory import backward_batch_size
from ..network.modes import borrowed
from ..options import Score
from ..task.samples import BATCH, batches
from ..types import Knob, Plan, Sensitivity
from . import criteria as hasa
from .curvature import gauss_newton
from .removal import removal_curvature

CURVATURE_IMAGES = 1000
DRAWS = 2  # of the signs for each image, for units: the second costs a backward pass without weight gradients


class OneShot(Protocol):
    """Judges a plan without training."""

    def one_shot(self, plan: Plan) -> tuple[float, float]:
        """Accuracy (share) and loss on the search split."""
        ...


class UnitScores:
    """Scores of all units by lambda; the curvature is computed once.

    Args:
        net: canonical dense network, eval mode.
        coupling: its groups.
        inputs: training images (n, C, H, W), augmented.
        score: a name in `hasa.SCORES`.
        seed: of the signs the curvature is sampled with, and of the score `random`.
        compute: where the curvature is computed.

    Raises:
        InputError: no such score.
    """

    def __init__(
        self,
        net: nn.Module,
        coupling: Coupling,
        inputs: Tensor,
        score: str,
        seed: int,
        compute: Compute = CPU,
    ) -> None:
        self.name, self._seed = hasa.known(score), seed
        self._weights = {n: m.weight.detach() for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        self._groups = coupling.units
        with borrowed(net, compute.device):
            net.eval()
            images = batches(inputs[:CURVATURE_IMAGES], backward_batch_size(net, inputs, compute, BATCH))
            connections = gauss_newton(net, images, seed=seed) if score == Score.PUBLISHED else None
            units = removal_curvature(net, coupling.units, images, DRAWS, seed) if score == Score.HASA else None
        self._connections = None if connections is None else {name: found.cpu() for name, found in connections.items()}
        self._units = None if units is None else {name: found.cpu() for name, found in units.items()}

    def at(self, lambda_: float) -> dict[str, Tensor]:
        """Group -> score of each unit (units,), float64 on the CPU."""
        if self._units is not None:
            squares = {name: weight.double().square() for name, weight in self._weights.items()}
            return {
                group: hasa.removal_scores(hasa.unit_scores(squares, units), self._units[group], lambda_)
                for group, units in self._groups.items()
            }
        scores = hasa.score(self.name, self._weights, self._connections, lambda_, seed=self._seed)
        return {group: hasa.unit_scores(scores, units) for group, units in self._groups.items()}

    def grid(self) -> tuple[float, ...]:
        """Lambdas worth trying."""
        return hasa.lambda_grid(self.name, self._connections)


def rank_units(
    net: fx.GraphModule,
    coupling: Coupling,
    knobs: tuple[Knob, ...],
    evaluator: OneShot,
    inputs: torch.Tensor,
    score: str,
    lambda_: float | None,
    seed: int,
    compute: Compute = CPU,
) -> Sensitivity:
    """Order the units of every channel group by score.

    Args:
        net: canonical dense network, eval mode.
        coupling: its groups.
        knobs: decisions of the search; those of inner groups are set to half for the tuning.
        evaluator: answers one-shot accuracy; its own order is not used.
        inputs: training images (n, C, H, W), augmented.
        score: a name in `hasa.SCORES`.
        lambda_: the paper's constant; None tunes it on the search split, by the one-shot accuracy with half of every inner group
            kept (the loss decides between equals).
        seed: of the signs that the curvature is sampled with, and of the score `random`.
        compute: where the curvature is computed.

    Raises:
        InputError: unknown score, or a lambda the score does not take.
    """
    scores = UnitScores(net, coupling, inputs, score, seed, compute)
    half = tuple(len(k.kept) // 2 if k.kind == "inner" else 0 for k in knobs)

    def order(lam: float) -> dict[str, tuple[int, ...]]:
        ranked = {name: found.argsort(descending=True, stable=True) for name, found in scores.at(lam).items()}
        return {name: tuple(int(i) for i in places) for name, places in ranked.items()}

    def one_shot(lam: float) -> float:
        accuracy, loss = evaluator.one_shot(plan_for(knobs, half, order(lam), score))
        return accuracy - 1e-3 * min(loss, 10.0)

    if lambda_ is not None or score not in hasa.CURVED:
        fixed = lambda_ or 0.0
        return Sensitivity(score, fixed, order(fixed))
    chosen, tried = hasa.tune_lambda(one_shot, scores.grid())
    return Sensitivity(score, chosen, order(chosen), tried)
