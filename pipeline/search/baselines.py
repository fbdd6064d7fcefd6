"""Baselines of the search: uniform pruning ratios and random settings."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np

from .latency_model import PATIENCE
from .problem import Levels
from .tally import Tally


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
