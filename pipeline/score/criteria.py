"""Scores of connections from magnitude and curvature (AMP-HASA, section 3), and how they become scores of channels.

What scores lowest is removed first. The paper's formula is `S = |w| exp(-lambda ||H||)`. Its text wants weights of high
curvature protected; its sign does the opposite, so of two equal weights the one the loss needs more goes first, and any lambda
that acts at all does no better than random masks. It is kept, sign and all, as `published`, for comparison. The score in use,
`hasa`, grows with curvature as every second-order criterion does (Optimal Brain Damage, LeCun, Denker & Solla 1989:
`1/2 h w^2`), damped by the layer's mean curvature. lambda stays the paper's constant, tuned on the search split: there it is
the exponent of the curvature.

A unit (a channel) gets the sum of the scores of its connections; of `hasa` it gets the same formula once more, with the unit's
weights as one vector and its curvature in that direction, see `removal_scores`.

Scores order connections within a layer and units within a group. How much each layer loses is not theirs to say (BatchNorm makes
layers invariant to their scale, while h goes with 1/||w||^2): that is the search's decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..axes.types import Unit
from ..errors import InputError
from ..options import Score

Rule = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]  # weight, curvature, lambda, generator -> score, same shape

FLOOR = 1e-12  # added to the damping: a layer without any curvature keeps the order of magnitude


def magnitude(weight: Tensor, curvature: Tensor, lam: float, generator: torch.Generator) -> Tensor:
    """`|w|`. Takes no notice of curvature and lambda."""
    return weight.abs()


def random(weight: Tensor, curvature: Tensor, lam: float, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1): what every score must beat."""
    return torch.rand(weight.shape, generator=generator).to(weight)


def published(weight: Tensor, curvature: Tensor, lam: float, generator: torch.Generator) -> Tensor:
    """`|w| exp(-lambda |h|)`: the published formula, sign included; it *falls* with curvature. lambda >= 0, in units of 1/h."""
    return weight.abs() * torch.exp(-_at_least_zero("published", lam) * curvature.abs())


def hasa(weight: Tensor, curvature: Tensor, lam: float, generator: torch.Generator) -> Tensor:
    """`w^2 (h + mean h)^lambda`, lambda in [0, 1]: 0 is magnitude, 1 is Optimal Brain Damage damped by the layer's mean.

    Negative curvature is noise of the estimate or a saddle, neither of which makes a removal pay: it counts as 0.
    """
    if not 0.0 <= lam <= 1.0:
        raise InputError("lambda of the score 'hasa'", found=str(lam), expected="0 to 1, or auto")
    positive = curvature.clamp(min=0)
    return weight.square() * (positive + positive.mean() + FLOOR) ** lam


SCORES: dict[str, Rule] = {Score.HASA: hasa, Score.PUBLISHED: published, Score.MAGNITUDE: magnitude, Score.RANDOM: random}
CURVED = frozenset({Score.HASA, Score.PUBLISHED})  # scores that need a curvature, and have a lambda to tune


def known(name: str) -> str:
    """The argument. Raises InputError if no score has this name."""
    if name not in SCORES:
        raise InputError("--score", found=repr(name), expected=f"one of {', '.join(SCORES)}")
    return name


def score(
    name: str, weights: Mapping[str, Tensor], curvature: Mapping[str, Tensor] | None, lam: float, *, seed: int = 0
) -> dict[str, Tensor]:
    """Scores of all connections.

    Args:
        name: a key of SCORES.
        weights: layer name -> weight.
        curvature: layer name -> curvature of the weight's shape; None for a score that is not in CURVED.
        lam: the paper's lambda; what it means is the score's to say.
        seed: for `random`.

    Returns:
        Layer name -> score of the weight's shape, on the weight's device, >= 0.

    Raises:
        InputError: no such score, a lambda out of its range, or scores that are not finite.
    """
    if known(name) in CURVED and curvature is None:
        raise ValueError(f"the score {name!r} needs a curvature")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for layer, weight in weights.items():
        w = weight.detach()
        h = w if name not in CURVED or curvature is None else curvature[layer].detach().to(w)
        if h.shape != w.shape:
            raise ValueError(f"curvature of {layer!r} has shape {tuple(h.shape)}, its weight {tuple(w.shape)}")
        found[layer] = SCORES[name](w, h, lam, generator)
        if not bool(found[layer].isfinite().all()):
            what = f"scores of layer {layer!r} are not finite"
            raise InputError(what, found="NaN or infinity in its weights or its curvature", do="check the model and the images")
    return found


def unit_scores(connection_scores: Mapping[str, Tensor], units: Iterable[Unit]) -> Tensor:
    """Scores of units: for each the sum of the scores of all its connections.

    Args:
        connection_scores: layer name -> score of the weight's shape.
        units: slices of other parameters (biases, normalisations) have no connections and are passed over.

    Returns:
        (units,) float64 on the CPU. Where two slices of one weight cross, the connections at the crossing count twice.

    Raises:
        ValueError: a unit has no connection among the scores, or an axis or index that its weight has not.
    """
    sums: dict[tuple[str, int], list[float]] = {}
    totals: list[float] = []
    for unit in units:
        scored = [s for s in unit.slices if s.parameter == f"{s.layer}.weight" and s.layer in connection_scores]
        if not scored:
            raise ValueError(f"no connection of a layer with scores in {unit}")
        for part in scored:
            values, key = connection_scores[part.layer], (part.layer, part.axis)
            if part.axis not in (0, 1) or not all(0 <= i < values.shape[part.axis] for i in part.indices):
                raise ValueError(
                    f"{part.indices} of axis {part.axis} of layer {part.layer!r}, whose shape is {tuple(values.shape)}"
                )
            if key not in sums:
                sums[key] = values.detach().double().transpose(0, part.axis).flatten(1).sum(1).tolist()
        totals.append(sum(sums[s.layer, s.axis][i] for s in scored for i in s.indices))
    return torch.tensor(totals, dtype=torch.float64)


def removal_scores(squares: Tensor, curvature: Tensor, lam: float) -> Tensor:
    """`hasa` of whole units: `|w|^2 (h + mean h)^lambda`, where h is v'Gv for each squared weight of the unit.

    lambda = 0 is the unit's squared magnitude; lambda = 1 is, but for the factor 1/2, the loss that the quadratic model predicts
    when the whole unit goes, damped as for connections. The sum of the connections' scores is not that: it takes them as if each
    went alone.

    Args:
        squares: (units,) |w|^2 of each unit of a group, the sum of its squared weights.
        curvature: (units,) v'Gv of each unit (`removal.removal_curvature`), v the weights that read it. h is this over
            |w|^2, which also counts the weights that make the unit: that scales the damping alone, never the term v'Gv.
        lam: in [0, 1].

    Raises:
        InputError: a lambda out of its range.
    """
    along = torch.where(squares > 0, curvature / squares.clamp(min=torch.finfo(squares.dtype).tiny), 0.0)
    return hasa(squares.sqrt(), along, lam, torch.Generator())


def lambda_grid(name: str, curvature: Mapping[str, Tensor] | None) -> tuple[float, ...]:
    """Lambdas worth trying for a score: exponents for `hasa`; for `published` 0 and steps of 1/mean|h|.

    A score without lambda gets (0.0,).
    """
    if name == Score.HASA:
        return (0.0, 0.25, 0.5, 0.75, 1.0)
    if name == Score.PUBLISHED and curvature:
        count = sum(h.numel() for h in curvature.values())
        mean = sum(float(h.abs().sum(dtype=torch.float64)) for h in curvature.values()) / max(count, 1)
        if mean > 0:
            return (0.0, 0.01 / mean, 0.1 / mean, 1.0 / mean, 10.0 / mean)
    return (0.0,)


def tune_lambda(evaluate: Callable[[float], float], grid: Iterable[float]) -> tuple[float, tuple[tuple[float, float], ...]]:
    """The lambda that does best on the search split.

    Args:
        evaluate: lambda -> accuracy there (higher is better) after pruning with it.
        grid: lambdas to try, in order; a repeated one is tried once.

    Returns:
        The best lambda, of equals the first of the grid; and every (lambda, accuracy) tried, in order.

    Raises:
        InputError: the grid is empty, or no evaluation gave a number.
    """
    tried = tuple((lam, evaluate(lam)) for lam in dict.fromkeys(grid))
    usable = [pair for pair in tried if not math.isnan(pair[1])]
    if not usable:
        raise InputError("lambda cannot be tuned", found=f"{len(tried)} tries, none a number", expected="at least one accuracy")
    return max(usable, key=lambda pair: pair[1])[0], tried


def _at_least_zero(name: str, lam: float) -> float:
    if not (lam >= 0.0 and math.isfinite(lam)):
        raise InputError(f"lambda of the score '{name}'", found=str(lam), expected="a number from 0, or auto")
    return lam
