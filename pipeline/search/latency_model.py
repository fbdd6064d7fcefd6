"""Latency of a setting from a table of measured savings, corrected by what the search measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..types import Candidate, Knob
from .problem import FloatArray, Levels, SearchSettings, canonical, dependents

Rows = tuple[FloatArray, ...]  # one array per knob, one number per level


KINDS = ("", "stream", "block")  # the first stands for all others: units within a block
PATIENCE = 300  # proposals in a row that were already known, after which a search has seen all it can reach


class LatencyModel:
    """The latency table, corrected by measured whole models.

    What fewer shortcut-coupled channels save in a layer, that layer's own pruning cannot save again, and two blocks that go may
    save more than each alone. So the savings of each kind of knob get a factor, those of each knob another one, and the whole an
    offset, by ridge regression (prior: the table is right) on the measured candidates, those near the budget more than others.

    Args:
        knobs: the decisions.
        estimate: latency ratio of levels by the table.
        settings: budget and mode.
    """

    NOISE = 0.02  # of one measured ratio
    PRIOR = (0.03, 0.5, 0.5, 0.5)  # standard deviations: offset, factor per kind
    PRIOR_KNOB = 0.3  # of a knob's own factor
    NEAR = 0.2  # distance from the budget, relative to it, at which a measurement counts exp(-1)
    LEAST = 0.1  # of a tabled saving at least this share stays, so that more pruning never looks slower

    def __init__(self, knobs: tuple[Knob, ...], estimate: Callable[[Levels], float], settings: SearchSettings) -> None:
        self._knobs, self._estimate, self._settings = knobs, estimate, settings
        self._inside = dependents(knobs)
        self._kind = np.array([KINDS.index(k.kind) if k.kind in KINDS else 0 for k in knobs])
        dense = (0,) * len(knobs)
        self._dense = estimate(dense)
        self._alone = tuple(
            np.array([self._dense - estimate((*dense[:i], j, *dense[i + 1 :])) for j in range(len(knob.kept))])
            for i, knob in enumerate(knobs)
        )
        deviations = np.array([*self.PRIOR, *[self.PRIOR_KNOB] * len(knobs)])
        self._precision: FloatArray = np.diag(1.0 / deviations**2)
        self._moment: FloatArray = np.zeros(len(deviations))
        self._weights: FloatArray = np.zeros(len(deviations))

    def _features(self, levels: Levels) -> FloatArray:
        """[1, tabled saving of the knobs within blocks, of streams and of blocks, then of each knob alone]."""
        savings: list[float] = []
        for kind in range(len(KINDS)):
            only = tuple(i if k == kind else 0 for i, k in zip(levels, self._kind, strict=True))
            savings.append(self._dense - self._estimate(only) if any(only) else 0.0)
        return np.array([1.0, *savings, *(row[level] for row, level in zip(self._alone, levels, strict=True))])

    def __call__(self, levels: Levels) -> float:
        """Predicted latency ratio."""
        levels = canonical(self._knobs, levels, self._inside)
        table = self._estimate(levels)
        return table + float(self._weights @ self._features(levels)) if self._weights.any() else table

    def observe(self, candidate: Candidate) -> None:
        """Learn from a measured whole model."""
        x: FloatArray = self._features(candidate.levels)
        distance = abs(candidate.spent / self._settings.budget - 1.0) / self.NEAR
        weight = (1.0 if self._settings.mode == "soft" else max(0.02, float(np.exp(-(distance**2))))) / self.NOISE**2
        self._precision = self._precision + weight * np.outer(x, x)
        self._moment = self._moment + weight * x * (candidate.spent - self._estimate(candidate.levels))
        solved = np.linalg.solve(self._precision, self._moment)
        weights = np.minimum(solved, 1.0 - self.LEAST)
        own = slice(len(self.PRIOR), None)  # more pruning never looks slower, whatever the two factors of a knob add up to
        weights[own] = np.minimum(weights[own], 1.0 - self.LEAST - weights[1 + self._kind])
        self._weights = weights

    def rows(self) -> Rows:
        """Predicted saving per knob and level, alone."""
        own = self._weights[len(self.PRIOR) :]
        factors = 1.0 - self._weights[1 + self._kind] - own
        return tuple(factor * row for factor, row in zip(factors, self._alone, strict=True))

    @property
    def dense(self) -> float:
        """Predicted latency ratio of level 0 everywhere, as `rows` are counted from it."""
        return self._dense + float(self._weights[0])
