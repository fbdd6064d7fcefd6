"""Which units of a group matter: scores of connections, summed over each unit, with lambda tuned on the search split."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from . import hasa
from .curvature import gauss_newton, local_hessian
from .errors import InputError
from .evaluate import StitchedEvaluator, plan_for
from .groups import IN, OUT, Coupling, Unit
from .types import Knob, Sensitivity

CURVATURE_IMAGES = 1000
MOMENT_IMAGES = 500  # at 8x8 positions each that is 50 columns for every row of a 576 x 576 matrix
BATCH = 100


def moments(net: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The layer-local Hessian X X^T of every convolution without groups and every linear layer, on the dense network's inputs."""
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)]
    return local_hessian(net, _batches(inputs[:MOMENT_IMAGES]), layers)


def rank_units(
    net: fx.GraphModule,
    coupling: Coupling,
    knobs: tuple[Knob, ...],
    evaluator: StitchedEvaluator,
    inputs: torch.Tensor,
    score: str,
    lambda_: float | None,
    seed: int,
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
        seed: of the labels that the curvature is sampled with, and of the score `random`.

    Raises:
        InputError: unknown score, or a lambda the score does not take.
    """
    if score not in hasa.SCORES:
        raise InputError("--score", found=repr(score), expected=f"one of {', '.join(hasa.SCORES)}")
    weights = {n: m.weight for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    curvature = gauss_newton(net, _batches(inputs[:CURVATURE_IMAGES]), seed=seed) if score in hasa.CURVED else None
    half = tuple(len(k.kept) // 2 if k.kind == "inner" else 0 for k in knobs)

    def order(lam: float) -> dict[str, tuple[int, ...]]:
        scores = hasa.score(score, weights, curvature, lam, seed=seed)
        return {name: _ranked(scores, units) for name, units in coupling.units.items()}

    def one_shot(lam: float) -> float:
        accuracy, loss = evaluator.one_shot(plan_for(knobs, half, order(lam), score))
        return accuracy - 1e-3 * min(loss, 10.0)

    if lambda_ is not None or score not in hasa.CURVED:
        fixed = lambda_ or 0.0
        return Sensitivity(score, fixed, order(fixed))
    chosen, tried = hasa.tune_lambda(one_shot, hasa.lambda_grid(score, curvature))
    return Sensitivity(score, chosen, order(chosen), tried)


def _ranked(scores: Mapping[str, torch.Tensor], units: tuple[Unit, ...]) -> tuple[int, ...]:
    members = [[(m.layer, m.role, m.index) for m in unit.members if m.role in (OUT, IN)] for unit in units]
    return tuple(int(i) for i in hasa.unit_scores(scores, members).argsort(descending=True, stable=True))


def _batches(inputs: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in torch.split(inputs, BATCH)]
