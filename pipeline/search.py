"""Search for the levels of all knobs: PPO, and what it must beat (uniform, random, knapsack), at equal evaluations.

Every method asks the same evaluator through one `Tally`, which counts distinct settings, so the methods differ in nothing but
what they ask for. A search is deterministic given the evaluator's answers: with the answers kept, a resumed search is a replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from . import knapsack
from .env import METHODS, Evaluator, Levels, SearchSettings, Sized, Wall, Wide, canonical, dependents, excess, reward, signal
from .knapsack import PATIENCE, LatencyModel, Rows
from .types import Candidate, Knob, SearchResult

__all__ = ["METHODS", "Evaluator", "Hints", "SearchSettings", "Tally", "search"]

Progress = Callable[[Candidate, float], None]

FINALISTS = 4  # plans that are solved whole before one is taken, see `finalists`


class SpentError(Exception):
    """A new setting was asked for and no evaluation was left. Ends a method; never leaves `search`."""


@dataclass(frozen=True)
class Hints:
    """What is known before a search."""

    plans: tuple[Levels, ...] = ()  # settings to begin with: they are evaluated first, and count
    losses: Rows | None = None  # per knob what each level costs alone, in any unit; the knapsack then need not measure it


class Tally:
    """The evaluator as the methods see it: counted, remembered, and with a latency table that learns.

    Repeats are answered from memory and cost nothing; settings that differ only inside removed blocks are repeats.

    Args:
        evaluator: answers for a setting.
        settings: of the search.
        progress: called after each distinct evaluation.
        hints: see there.

    Raises:
        InputError: hard mode, and the budget or the size limit cannot be reached (see `Wall`).
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
            Wall(evaluator.knobs, self._size, replace(settings, budget=self._room, limits="size"))
        self.wall = Wall(evaluator.knobs, self.latency_estimate, settings)
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
    """
    if settings.mode == "soft":
        return tuple(sorted(tried, key=lambda c: (-reward(c, settings), c.spent, c.loss)))
    within = (c for c in tried if excess(c, settings) <= 0.0)
    return tuple(sorted(within, key=lambda c: (-c.accuracy, c.spent, c.loss)))


def choose(tried: tuple[Candidate, ...], settings: SearchSettings) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """The `FINALISTS` best candidates, best first; with none within the limits the nearest to them alone, and a note."""
    if allowed := best_first(tried, settings):
        return allowed[:FINALISTS], ()
    nearest = min(tried, key=lambda c: (excess(c, settings), -c.accuracy, c.loss))
    limit, reached = f"the {settings.limits} budget of {settings.budget:.3f}", f"{nearest.spent:.3f}"
    if settings.max_size_bytes is not None and nearest.size_bytes is not None:
        limit += f" and {settings.max_size_bytes:,} bytes"
        reached += f" and {nearest.size_bytes:,} bytes"
    note = f"no candidate was within {limit}; the nearest, {reached}, was taken"
    return (nearest,), (note,)


def search(
    evaluator: Evaluator, settings: SearchSettings, progress: Progress | None = None, hints: Hints | None = None
) -> SearchResult:
    """Spend exactly `settings.evaluations` distinct evaluations (fewer only when there are no more settings) and choose.

    Args:
        evaluator: answers for a setting. Must not depend on the order of the questions.
        settings: method, budget, mode, seed.
        progress: called after each distinct evaluation with the candidate and its reported reward.
        hints: what is known beforehand; the same for every method that is compared.

    Raises:
        InputError: hard mode, and the budget cannot be reached by the latency table.
    """
    began = time.perf_counter()
    tally = Tally(evaluator, settings, progress, hints)
    rng = np.random.default_rng(settings.seed)
    try:
        for levels in tally.hints.plans:
            tally.evaluate(levels)
        if settings.method == "ppo":
            from . import ppo  # imports torch and stable-baselines3: seconds that the other methods do without

            ppo.run(tally, rng)
        elif settings.method == "knapsack":
            knapsack.run(tally, settings.evaluations, rng)
        elif settings.method == "uniform":
            uniform(tally, rng)
        else:
            at_random(tally, rng)
        fill(tally, rng)
    except SpentError:
        pass
    tried = tuple(tally.tried)
    finalists, notes = choose(tried, settings)
    if tally.left > 0:
        notes = (*notes, f"{len(tried)} of {settings.evaluations} evaluations were spent: no further setting was found")
    return SearchResult(
        method=settings.method,
        best=finalists[0],
        tried=tried,
        rewards=tuple(tally.rewards),
        evaluations=len(tried),
        seconds=time.perf_counter() - began,
        budget=settings.budget,
        finalists=finalists,
        notes=notes,
    )


def uniform(tally: Tally, rng: np.random.Generator) -> None:
    """One threshold for all knobs, swept from where the wall lets it in to 1 and refined around the budget.

    There are only as many uniform settings as knobs have levels; what is left then goes to one threshold per kind of knob,
    drawn at random, with a jitter that grows while nothing new is found.
    """
    n = len(tally.knobs)
    grid = np.linspace(0.0, 1.0, 17)
    tally.expect(tally.wall.levels(tally.wall.clip(np.full(n, t))) for t in grid)
    for t in grid:
        tally.evaluate(tally.wall.levels(tally.wall.clip(np.full(n, t))))
    for centre in grid[:-1]:  # between the grid points, the ones near the wall first
        for offset in np.linspace(0.0, grid[1], 5)[1:-1]:
            tally.evaluate(tally.wall.levels(tally.wall.clip(np.full(n, centre + offset))))
    kinds = sorted({k.kind for k in tally.knobs})
    kind = np.array([kinds.index(k.kind) for k in tally.knobs])

    def draw(source: np.random.Generator, stale: int) -> Levels:
        thresholds = source.uniform(0.0, source.uniform(), len(kinds))[kind] + 0.01 * stale * source.standard_normal(n)
        return tally.wall.levels(tally.wall.clip(thresholds))

    _until_stale(tally, draw, rng)


def at_random(tally: Tally, rng: np.random.Generator) -> None:
    """Independent thresholds, uniform between 0 and an upper end that is itself uniform, through the wall.

    Without the upper end nearly every draw would lose half of the blocks and lie far under the budget.
    """

    def draw(source: np.random.Generator, _: int) -> Levels:
        return tally.wall.levels(tally.wall.clip(source.uniform(0.0, source.uniform(), len(tally.knobs))))

    _until_stale(tally, draw, rng)


def fill(tally: Tally, rng: np.random.Generator) -> None:
    """Levels drawn evenly, wall or not: only for what a method that ran dry has left over, in very small problems."""
    _until_stale(tally, lambda source, _: tuple(int(source.integers(len(k.kept))) for k in tally.knobs), rng)


def _until_stale(tally: Tally, draw: Callable[[np.random.Generator, int], Levels], rng: np.random.Generator) -> None:
    """Evaluate what is drawn until nothing new has been drawn for long; `draw` is told for how many draws that has been so."""
    stale, turn = 0, 0
    while stale < PATIENCE:
        if turn % tally.width == 0:
            twin = deepcopy(rng)
            tally.expect(draw(twin, stale) for _ in range(tally.width))
        levels, turn = draw(rng, stale), turn + 1
        stale = stale + 1 if tally.seen(levels) else 0
        tally.evaluate(levels)
