"""The search problem: knobs, an evaluator, a reward, and the budget as a hard constraint.

A setting is one level per knob. Policies speak in pruning ratios: per knob the share of units to remove,
in [0, 1] (`Knob.level` rounds it to what the target allows).

The budget is on latency where pruning buys latency: where channels and blocks go. The zeros of a mask buy none, so there it is
on density, the share of connections that stay (`Candidate.spent` is the one or the other). "Latency" and "fast" below are the
words of the first case; nothing else differs in the second. Where the artifact's size is limited too, a setting has to fit
both: its size, as a share of what is allowed, counts as if that share of the budget were spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError
from ..options import Reward, SearchMethod
from ..types import Candidate, Knob

FloatArray = NDArray[np.float64]
Levels = tuple[int, ...]

UNITS = {  # of a budget: what it is counted in, what is called of which there can be no less, and its option
    "latency": ("of the dense float latency", "fastest", "--latency-budget"),
    "density": ("of the connections", "sparsest", "--latency-budget"),
    "size": ("bytes", "smallest", "--max-size"),
}
TOLERANCE = 0.02  # measured latency may exceed the budget by this share: under it lies the noise of one measurement
SIZE_ROOM = 0.02  # of a size limit that candidates leave free: labels and metadata come on top
PENALTY = 5.0  # what a latency over budget costs, in units of accuracy per unit of excess relative to the budget
SHAPING = 0.1  # weight of the loss in the training signal
LOSS_CAP = 4.0  # a loss beyond it (or not finite) tells no more


class Evaluator(Protocol):
    """Answers what a setting costs and what it is worth."""

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The decisions, in the order of every `levels` tuple."""
        ...

    def evaluate(self, levels: Levels) -> Candidate:
        """Accuracy on the reward set and measured latency ratio. Expensive; the same levels give the same answer."""
        ...

    def latency_estimate(self, levels: Levels) -> float:
        """What the budget limits, without measuring: the ratio to the dense float model from a table of single-knob
        measurements, or the density of masks.
        """
        ...


@runtime_checkable
class Sized(Protocol):
    """An evaluator that estimates the size of artifacts."""

    def size_estimate(self, levels: Levels) -> float:
        """Bytes of a setting's artifact without labels and metadata."""
        ...


@runtime_checkable
class Wide(Protocol):
    """An evaluator with several boards, which measure in parallel what is announced to it."""

    @property
    def width(self) -> int:
        """Number of boards."""
        ...

    def expect(self, settings: Sequence[Levels]) -> None:
        """Announces settings that are likely to be asked for next. Changes when an answer is ready, never the answer."""
        ...


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search.

    Raises:
        InputError: a value out of its range.
    """

    method: str  # of SearchMethod
    evaluations: int  # distinct settings the evaluator is asked for, the same for every method
    budget: float  # on `Candidate.spent`; in soft mode only a hint
    mode: str = "hard"  # of Reward
    alpha: float = 1.0  # soft mode: weight of accuracy
    beta: float = 1.0  # soft mode: weight of the latency ratio, or of the density
    seed: int = 0
    warm_start: bool = True  # ppo: the first part of the evaluations goes to the knapsack, whose plan is the first policy
    limits: str = "latency"  # what the budget is on: a key of UNITS
    max_size_bytes: int | None = None  # hard mode: of the artifact; the evaluator has to be `Sized`

    def __post_init__(self) -> None:
        if self.method not in tuple(SearchMethod):
            raise InputError("search method", found=repr(self.method), expected=", ".join(SearchMethod))
        if self.mode not in tuple(Reward):
            raise InputError("search mode", found=repr(self.mode), expected=", ".join(Reward))
        if self.limits not in UNITS:
            raise InputError("what the budget is on", found=repr(self.limits), expected=", ".join(UNITS))
        if self.evaluations < 1:
            raise InputError("search evaluations", found=str(self.evaluations), expected="at least 1")
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise InputError(f"{self.limits} budget", found=str(self.budget), expected="a share of the dense model's above 0")

    @property
    def room_bytes(self) -> float | None:
        """Most bytes a candidate's file may take; None: no limit."""
        return None if self.max_size_bytes is None else (1.0 - SIZE_ROOM) * self.max_size_bytes


def excess(candidate: Candidate, settings: SearchSettings) -> float:
    """By which share a candidate exceeds what is allowed, less the tolerance; 0 or less: it is within."""
    over = candidate.spent / settings.budget - 1.0 - TOLERANCE
    if settings.room_bytes is None or candidate.size_bytes is None:
        return over
    return max(over, candidate.size_bytes / settings.room_bytes - 1.0)


def reward(candidate: Candidate, settings: SearchSettings) -> float:
    """The reward that is reported.

    hard: `accuracy - 5 * max(0, spent / budget - 1.02)`; inside the budget it is the accuracy. A size limit counts the same way.
    soft: `alpha * accuracy - beta * spent` (AMP-HASA's reward, with measured latency in place of sparsity where there is one).
    """
    if settings.mode == "soft":
        return settings.alpha * candidate.accuracy - settings.beta * candidate.spent
    return candidate.accuracy - PENALTY * max(0.0, excess(candidate, settings))


def signal(candidate: Candidate, settings: SearchSettings) -> float:
    """What policies and local moves maximise: the reward minus 0.1 times the loss, capped at 4.

    Near chance accuracies are all alike and give no direction; the loss still falls.
    """
    loss = min(candidate.loss, LOSS_CAP) if math.isfinite(candidate.loss) else LOSS_CAP
    weight = settings.alpha if settings.mode == "soft" else 1.0
    return reward(candidate, settings) - weight * SHAPING * loss


def dependents(knobs: tuple[Knob, ...]) -> dict[int, tuple[int, ...]]:
    """Block knob -> the knobs inside, which decide nothing once that block is removed, as positions in `knobs`."""
    blocks = {k.name: i for i, k in enumerate(knobs) if k.kind == "block"}
    return {b: tuple(i for i, k in enumerate(knobs) if k.block == name) for name, b in blocks.items()}


def canonical(knobs: tuple[Knob, ...], levels: Levels, inside: Mapping[int, tuple[int, ...]] | None = None) -> Levels:
    """The same network's levels with the knobs inside removed blocks at level 0."""
    out = list(levels)
    for block, inner in (dependents(knobs) if inside is None else inside).items():
        if knobs[block].kept[levels[block]] == 0:
            for i in inner:
                out[i] = 0
    return tuple(out)


def levels_of(knobs: tuple[Knob, ...], shares: ArrayLike) -> Levels:
    """Levels of pruning ratios (shares to remove, one per knob)."""
    return tuple(k.level(float(t)) for k, t in zip(knobs, np.asarray(shares, dtype=np.float64), strict=True))


def shares_of(knobs: tuple[Knob, ...], levels: Levels) -> FloatArray:
    """Shares removed at these levels; `levels_of` of them gives the levels again."""
    return np.array([1.0 - k.kept[i] / k.size for k, i in zip(knobs, levels, strict=True)], dtype=np.float64)


def bounds(knob: Knob, level: int) -> tuple[float, float]:
    """The least and the largest share to remove that is rounded to a level; for the last one as far as the one before it is."""
    shares = [1.0 - kept / knob.size for kept in knob.kept]
    low = 0.0 if level == 0 else (shares[level - 1] + shares[level]) / 2
    if level + 1 < len(shares):
        return low, (shares[level] + shares[level + 1]) / 2
    return low, min(1.0, 2 * shares[level] - low)


class BudgetConstraint:
    """Projects actions onto the budget (AMC's constrained action, He et al. 2018, section 3.3, there by MACs).

    Shares over budget move by one scalar t towards the fastest setting, `a' = a + t (f - a)` with f = 1 where a knob is
    fastest at its last level, until the estimate is within budget. In soft mode nothing is constrained.

    Args:
        knobs: the decisions.
        estimate: free latency ratio of levels; may improve as whole models are measured.
        settings: budget and mode.

    Raises:
        InputError: hard mode, and even the fastest setting is over budget by the estimate.
    """

    STEPS = 16  # halvings of t

    def __init__(self, knobs: tuple[Knob, ...], estimate: Callable[[Levels], float], settings: SearchSettings) -> None:
        self._knobs, self._estimate, self._settings = knobs, estimate, settings
        self._inside = dependents(knobs)
        far = self._find_fastest()
        last = [i == len(k.kept) - 1 for i, k in zip(far, knobs, strict=True)]
        self._target = np.where(last, 1.0, shares_of(knobs, far))
        self.fastest = canonical(knobs, far, self._inside)
        ratio = estimate(self.fastest)
        if settings.mode == "hard" and not ratio <= settings.budget:
            unit, least, option = UNITS[settings.limits]
            found, reachable = (f"{n:,.0f}" if unit == "bytes" else f"{n:.3f}" for n in (settings.budget, ratio))
            raise InputError(
                f"the {settings.limits} budget cannot be reached by pruning",
                found=f"{found} {unit}",
                expected=f"at least {reachable}, the {least} reachable",
                do=f"raise {option}",
            )

    def _find_fastest(self) -> Levels:
        """Knob after knob the level with the least estimate, until nothing changes. Exact for an additive table.

        A wider layer may be faster than a narrower one whose width the kernels do not like. Inner knobs come first, while
        every block is still there, so that they have a direction of their own.
        """
        knobs = self._knobs
        order = sorted(range(len(knobs)), key=lambda i: knobs[i].kind == "block")
        levels = tuple(0 if k.kind == "block" else len(k.kept) - 1 for k in knobs)
        for _ in knobs:
            before = levels
            for i in order:
                options = [(*levels[:i], j, *levels[i + 1 :]) for j in range(len(knobs[i].kept))]
                levels = min(options, key=lambda o: (self._estimate(canonical(knobs, o, self._inside)), o[i] != before[i]))
            if levels == before:
                break
        return levels

    def levels(self, shares: ArrayLike) -> Levels:
        """Canonical levels of shares to remove."""
        return canonical(self._knobs, levels_of(self._knobs, shares), self._inside)

    def project(self, shares: ArrayLike) -> Levels:
        """Canonical levels within budget of shares to remove."""
        return self.levels(self.clip(shares))

    def clip(self, shares: ArrayLike) -> FloatArray:
        """Shares whose levels are within budget by the estimate; the same ones if they already are."""
        start = np.clip(np.asarray(shares, dtype=np.float64), 0.0, 1.0)
        if self._settings.mode == "soft" or self._estimate(self.levels(start)) <= self._settings.budget:
            return start
        low, high = 0.0, 1.0
        for _ in range(self.STEPS):
            middle = (low + high) / 2
            if self._estimate(self.levels(start + middle * (self._target - start))) <= self._settings.budget:
                high = middle
            else:
                low = middle
        # At t = 1 the target itself: 'start + (target - start)' may differ from it by rounding.
        return self._target.copy() if high == 1.0 else start + high * (self._target - start)
