"""Baselines of the search: uniform pruning ratios and random settings."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np

from .latency_model import PATIENCE
from .problem import Levels
from .search_log import SearchLog


def uniform(log: SearchLog, rng: np.random.Generator) -> None:
    """Evaluates one pruning ratio for all knobs, swept from the first one within budget to 1 and refined around the budget.

    There are only as many uniform settings as knobs have levels; what is left then goes to one ratio per kind of knob,
    drawn at random, with a jitter that grows while nothing new is found.
    """
    n = len(log.knobs)
    grid = np.linspace(0.0, 1.0, 17)
    log.expect(log.constraint.project(np.full(n, t)) for t in grid)
    for t in grid:
        log.evaluate(log.constraint.project(np.full(n, t)))
    for centre in grid[:-1]:  # between the grid points, the ones near the budget first
        for offset in np.linspace(0.0, grid[1], 5)[1:-1]:
            log.evaluate(log.constraint.project(np.full(n, centre + offset)))
    kinds = sorted({k.kind for k in log.knobs})
    kind = np.array([kinds.index(k.kind) for k in log.knobs])

    def draw(source: np.random.Generator, stale: int) -> Levels:
        shares = source.uniform(0.0, source.uniform(), len(kinds))[kind] + 0.01 * stale * source.standard_normal(n)
        return log.constraint.project(shares)

    _until_stale(log, draw, rng)


def at_random(log: SearchLog, rng: np.random.Generator) -> None:
    """Evaluates independent pruning ratios, uniform between 0 and an upper end that is itself uniform, projected onto the budget.

    Without the upper end nearly every draw would lose half of the blocks and lie far under the budget.
    """

    def draw(source: np.random.Generator, _: int) -> Levels:
        return log.constraint.project(source.uniform(0.0, source.uniform(), len(log.knobs)))

    _until_stale(log, draw, rng)


def fill(log: SearchLog, rng: np.random.Generator) -> None:
    """Evaluates levels drawn evenly, within budget or not: for what other methods leave over in very small problems."""
    _until_stale(log, lambda source, _: tuple(int(source.integers(len(k.kept))) for k in log.knobs), rng)


def _until_stale(log: SearchLog, draw: Callable[[np.random.Generator, int], Levels], rng: np.random.Generator) -> None:
    """Evaluates what is drawn until nothing new has been drawn for long; `draw` is told for how many draws that has been so."""
    stale, turn = 0, 0
    while stale < PATIENCE:
        if turn % log.width == 0:
            twin = deepcopy(rng)
            log.expect(draw(twin, stale) for _ in range(log.width))
        levels, turn = draw(rng, stale), turn + 1
        stale = stale + 1 if log.seen(levels) else 0
        log.evaluate(levels)
