"""The evaluations of a search: which settings were asked for, and their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..types import Candidate, Knob
from .latency_model import LatencyModel, Rows
from .problem import (
    BudgetConstraint,
    Evaluator,
    Levels,
    SearchSettings,
    Sized,
    Wide,
    canonical,
    dependents,
    excess,
    reward,
    signal,
)

Progress = Callable[[Candidate, float], None]
NOTHING = 1e-3  # an accuracy below which a metric that is 0 for everything, as mAP can be, tells no candidates apart


class SpentError(Exception):
    """A new setting was asked for and no evaluation was left. Ends a method; never leaves `search`."""


@dataclass(frozen=True)
class Hints:
    """Prior knowledge for a search."""

    plans: tuple[Levels, ...] = ()  # settings to begin with: they are evaluated first, and count
    losses: Rows | None = None  # per knob what each level costs alone, in any unit; the knapsack then need not measure it


class SearchLog:
    """The evaluator as the search methods see it: counted, cached, and with a latency table that learns.

    Repeats are answered from the cache and cost nothing; settings that differ only inside removed blocks are repeats.

    Args:
        evaluator: answers for a setting.
        settings: of the search.
        progress: called after each distinct evaluation.
        hints: see there.

    Raises:
        InputError: hard mode, and the budget or the size limit cannot be reached (see `BudgetConstraint`).
    """

    def __init__(
        self, evaluator: Evaluator, settings: SearchSettings, progress: Progress | None = None, hints: Hints | None = None
    ) -> None:
        self.settings, self.hints = settings, hints or Hints()
        self._evaluator, self._progress = evaluator, progress
        self.tried: list[Candidate] = []
        self.rewards: list[float] = []
        self.latency = LatencyModel(evaluator.knobs, evaluator.latency_estimate, settings)
        self._room = settings.room_bytes if settings.mode == "hard" else None
        if self._room is not None:  # whether it can be kept at all
            BudgetConstraint(evaluator.knobs, self._size, replace(settings, budget=self._room, limits="size"))
        self.constraint = BudgetConstraint(evaluator.knobs, self.latency_estimate, settings)
        self._inside = dependents(evaluator.knobs)
        self._memo: dict[Levels, Candidate] = {}

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The evaluator's knobs."""
        return self._evaluator.knobs

    @property
    def left(self) -> int:
        """Evaluations left."""
        return self.settings.evaluations - len(self.tried)

    @property
    def leader(self) -> Candidate:
        """The candidate with the highest training signal so far."""
        return max(self.tried, key=lambda c: signal(c, self.settings))

    def seen(self, levels: Levels) -> bool:
        """Whether this setting was evaluated before."""
        return canonical(self.knobs, levels, self._inside) in self._memo

    @property
    def sized(self) -> bool:
        """Whether the artifact's size is limited too."""
        return self._room is not None

    def latency_estimate(self, levels: Levels) -> float:
        """Latency ratio by the corrected table; or, where it is more, the share of the budget that the size stands for."""
        latency = self.latency(levels)
        return latency if self._room is None else max(latency, self._size_share(levels))

    def beside_leader(self, levels: Levels) -> float:
        """Latency ratio of a setting near the leader: what was measured there, and the predicted difference to it."""
        return self.latency(levels) + self.leader.spent - self.latency(self.leader.levels)

    def size_counts(self, levels: Levels) -> bool:
        """Whether a setting is nearer to the size limit than to the budget."""
        return self._room is not None and self._size_share(levels) > self.latency(levels)

    def savings(self, part: float) -> tuple[Rows, float]:
        """What each level of each knob alone saves of the budget, and what the dense network spends of it.

        `part` of it is counted by size, the rest by latency: a setting within both limits is within every such mixture.
        """
        rows, dense = self.latency.rows(), self.latency.dense
        if part == 0.0:
            return rows, dense
        mixed = tuple((1.0 - part) * row + part * size for row, size in zip(rows, self._size_rows, strict=True))
        return mixed, (1.0 - part) * dense + part * self._size_share((0,) * len(self.knobs))

    @cached_property
    def _size_rows(self) -> Rows:
        none = (0,) * len(self.knobs)
        whole = self._size_share(none)
        alone = [[(*none[:i], j, *none[i + 1 :]) for j in range(len(k.kept))] for i, k in enumerate(self.knobs)]
        return tuple(np.array([whole - self._size_share(levels) for levels in row]) for row in alone)

    def _size_share(self, levels: Levels) -> float:
        assert self._room is not None  # asked for where there is a limit
        return self.settings.budget * self._size(levels) / self._room

    def _size(self, levels: Levels) -> float:
        if not isinstance(self._evaluator, Sized):
            raise TypeError("a size limit needs an evaluator that knows sizes")
        return self._evaluator.size_estimate(levels)

    @property
    def width(self) -> int:
        """How many settings the evaluator works on at once, once it is told of them (`expect`)."""
        return self._evaluator.width if isinstance(self._evaluator, Wide) else 1

    def expect(self, settings: Iterable[Levels]) -> None:
        """Say what is likely to be asked for next, so that several boards can begin with it.

        A guess that was wrong costs their time and nothing else: what a search asks and finds does not depend on it. The
        settings are not even made where there is one board.
        """
        if isinstance(self._evaluator, Wide) and self.width > 1:
            new = dict.fromkeys(canonical(self.knobs, levels, self._inside) for levels in settings)
            self._evaluator.expect([levels for levels in new if levels not in self._memo][: self.left])

    def evaluate(self, levels: Levels) -> Candidate:
        """The candidate of these levels.

        Raises:
            SpentError: it is new and no evaluation is left.
        """
        levels = canonical(self.knobs, levels, self._inside)
        known = self._memo.get(levels)
        if known is not None:
            return known
        if self.left <= 0:
            raise SpentError
        candidate = self._evaluator.evaluate(levels)
        self._memo[levels] = candidate
        self.tried.append(candidate)
        self.rewards.append(reward(candidate, self.settings))
        self.latency.observe(candidate)
        if self._progress is not None:
            self._progress(candidate, self.rewards[-1])
        return candidate


def best_first(tried: Iterable[Candidate], settings: SearchSettings) -> tuple[Candidate, ...]:
    """Candidates that may be taken, the best one first.

    hard: those within 1.02 times the budget, and the size limit, by accuracy, then the faster (or sparser), then the lower loss.
    soft: all, by reward, then the same.
    Where the metric is 0 for several, the loss is all that tells them apart and comes before speed.
    """

    def then(c: Candidate) -> tuple[float, float, float]:
        loss = c.loss if math.isfinite(c.loss) else math.inf
        return (loss if c.accuracy < NOTHING else 0.0, c.spent, c.loss)

    if settings.mode == "soft":
        return tuple(sorted(tried, key=lambda c: (-reward(c, settings), *then(c))))
    within = (c for c in tried if excess(c, settings) <= 0.0)
    return tuple(sorted(within, key=lambda c: (-c.accuracy, *then(c))))
