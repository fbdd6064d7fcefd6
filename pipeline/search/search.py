"""Search for the levels of all knobs: PPO, and what it must beat (uniform, random, knapsack), at equal evaluations.

Every method asks the same evaluator through one `SearchLog`, which counts distinct settings, so the methods differ in nothing but
what they ask for. A search is deterministic given the evaluator's answers: with the answers kept, a resumed search is a replay.
"""

from __future__ import annotations

import time

import numpy as np

from ..types import Candidate, SearchResult
from . import knapsack
from .baselines import at_random, fill, uniform
from .problem import Evaluator, SearchSettings, excess
from .search_log import Hints, Progress, SearchLog, SpentError, best_first

FINALISTS = 4  # plans that are solved whole before one is taken, see `finalists`


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
    log = SearchLog(evaluator, settings, progress, hints)
    rng = np.random.default_rng(settings.seed)
    try:
        for levels in log.hints.plans:
            log.evaluate(levels)
        if settings.method == "ppo":
            from . import ppo  # imports torch and stable-baselines3: seconds that the other methods do without

            ppo.run(log, rng)
        elif settings.method == "knapsack":
            knapsack.run(log, settings.evaluations, rng)
        elif settings.method == "uniform":
            uniform(log, rng)
        else:
            at_random(log, rng)
        fill(log, rng)
    except SpentError:
        pass
    tried = tuple(log.tried)
    finalists, notes = choose(tried, settings)
    if log.left > 0:
        notes = (*notes, f"{len(tried)} of {settings.evaluations} evaluations were spent: no further setting was found")
    return SearchResult(
        method=settings.method,
        best=finalists[0],
        tried=tried,
        rewards=tuple(log.rewards),
        evaluations=len(tried),
        seconds=time.perf_counter() - began,
        budget=settings.budget,
        finalists=finalists,
        notes=notes,
    )
