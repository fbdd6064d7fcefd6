"""Which units of a group matter, by score, with lambda tuned on the search split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ..axes.types import Unit
from ..errors import InputError
from ..network.compute import CPU, Compute
from ..network.exact_mode import Batch, weight_layers
from ..network.memory import backward_batch_size
from ..network.modes import borrowed
from ..options import Score
from ..run_folder import Stage
from ..task.samples import BATCH, batches
from ..types import Sensitivity
from . import criteria as hasa
from .curvature import gauss_newton, kept_or
from .removal import removal_curvature

CURVATURE_IMAGES = 1000
DRAWS = 2  # of the signs for each image, for units: the second costs a backward pass without weight gradients

Order = Mapping[str, tuple[int, ...]]  # group -> its units, highest score first
Groups = Mapping[str, Sequence[Unit]]  # group -> its units


class UnitScores:
    """Scores of all units of a classifier by lambda; the curvature is computed once.

    Args:
        net: dense network with plain weights, eval mode; gives logits (N, classes).
        groups: whose units are scored; every unit has weights of convolutions or linear layers.
        inputs: training images (n, C, H, W), augmented.
        score: a name in `hasa.SCORES`.
        seed: of the signs that the curvature is sampled with, and of the score `random`.
        compute: where the curvature is computed.
        keeps: the stage that stores the curvature between calls; None: none does.

    Raises:
        InputError: no such score.
    """

    def __init__(
        self,
        net: nn.Module,
        groups: Groups,
        inputs: Tensor,
        score: str,
        seed: int,
        compute: Compute = CPU,
        keeps: Stage | None = None,
    ) -> None:
        self.name, self._seed, self._groups = hasa.known(score), seed, groups
        self._weights = {n: m.weight.detach() for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        self._connections: dict[str, Tensor] | None = None
        self._units: dict[str, Tensor] | None = None

        def measured(curvature: Callable[[Sequence[Batch]], dict[str, Tensor]]) -> dict[str, Tensor]:
            with borrowed(net, compute.device):
                net.eval()
                return curvature(batches(inputs[:CURVATURE_IMAGES], backward_batch_size(net, inputs, compute, BATCH)))

        if score == Score.PUBLISHED:
            shapes = {name: weight.shape for name, weight in self._weights.items()}
            self._connections = kept_or(keeps, lambda: measured(lambda images: gauss_newton(net, images, seed=seed)), shapes)
        if score == Score.HASA:
            sizes = {name: (len(units),) for name, units in groups.items()}
            self._units = kept_or(
                keeps, lambda: measured(lambda images: removal_curvature(net, groups, images, DRAWS, seed)), sizes
            )

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


def scored_by_loss(net: nn.Module, groups: Groups) -> bool:
    """Whether `UnitScores` can score these units: every unit is read by a convolution or linear layer that owns its weight."""
    try:
        layers = weight_layers(net).keys()
    except InputError:  # shared or computed weights
        return False
    return all(
        any(part.axis == 1 and part.parameter == f"{part.layer}.weight" and part.layer in layers for part in units[0].slices)
        for units in groups.values()
    )


def ordered(scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Each group's units, highest score first; of equal ones the first."""
    return {name: tuple(found.argsort(descending=True, stable=True).tolist()) for name, found in scores.items()}


def shares(scores: Mapping[str, Tensor], order: Order) -> dict[str, tuple[float, ...]]:
    """Each unit's share of its group's summed score, in the order given; without groups that have negative scores, or 0 alone."""
    sums = {name: float(found.sum()) if bool((found >= 0).all()) else 0.0 for name, found in scores.items()}
    return {name: tuple((scores[name][list(units)] / sums[name]).tolist()) for name, units in order.items() if sums[name] > 0.0}


def rank_units(scores: UnitScores, judged: Callable[[Order], tuple[float, float]], lambda_: float | None) -> Sensitivity:
    """Order the units of every group by score.

    Args:
        scores: of the units.
        judged: one-shot accuracy (share) and loss on the search split, with half of the units of groups kept by an order.
        lambda_: the paper's constant; None tunes it by `judged` (the loss decides between equals).

    Raises:
        InputError: a lambda that the score does not take.
    """
    if lambda_ is not None or scores.name not in hasa.CURVED:
        return _ranked(scores, lambda_ or 0.0)

    def one_shot(lam: float) -> float:
        accuracy, loss = judged(ordered(scores.at(lam)))
        return accuracy - 1e-3 * min(loss, 10.0)

    chosen, tried = hasa.tune_lambda(one_shot, scores.grid())
    return _ranked(scores, chosen, tried)


def _ranked(scores: UnitScores, lambda_: float, tried: tuple[tuple[float, float], ...] = ()) -> Sensitivity:
    found = scores.at(lambda_)
    order = ordered(found)
    return Sensitivity(scores.name, lambda_, order, tried, shares(found, order))
