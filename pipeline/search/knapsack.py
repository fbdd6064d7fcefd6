"""Multiple-choice knapsack: a loss and a latency saving per knob and level, and the setting of least loss within budget.

HALP (Shen et al. 2022) solves channel pruning as a knapsack over a latency table; SPDY (Frantar and Alistarh 2022) solves it
again and again with varied sensitivities and judges the plans by whole models. Here both tables start from single knobs and are
corrected by every whole model that was measured; plans are drawn from what the loss table may still be (Thompson sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import Candidate, Knob
from .latency_model import PATIENCE, Rows
from .problem import LOSS_CAP, FloatArray, Levels, canonical, dependents, excess
from .search_log import SearchLog

IntArray = NDArray[np.int64]

BINS = 4_000  # steps of the dynamic programme


@dataclass(frozen=True)
class _Choices:
    """What a part of the network may be: one row per option, savings and losses summed over its knobs."""

    knobs: tuple[int, ...]
    levels: IntArray  # (options, knobs)
    saving: FloatArray  # (options,)
    loss: FloatArray  # (options,)

    def pick(self, which: NDArray[np.bool_] | IntArray) -> _Choices:
        """Some of the options."""
        return _Choices(self.knobs, self.levels[which], self.saving[which], self.loss[which])

    def plus(self, other: _Choices) -> _Choices:
        """The options of both, which are about the same knobs."""
        return _Choices(
            self.knobs,
            np.concatenate([self.levels, other.levels]),
            np.concatenate([self.saving, other.saving]),
            np.concatenate([self.loss, other.loss]),
        )

    def front(self) -> _Choices:
        """Without the options that save no more and cost no less than another one, or that save less than nothing."""
        order = np.lexsort((self.loss, -self.saving))
        cheapest = np.minimum.accumulate(np.concatenate([[np.inf], self.loss[order][:-1]]))
        return self.pick(order[(self.loss[order] < cheapest) & (self.saving[order] >= 0)])

    def times(self, other: _Choices) -> _Choices:
        """Every option of the one with every option of the other."""
        i, j = (grid.ravel() for grid in np.indices((len(self.saving), len(other.saving))))
        levels = np.concatenate([self.levels[i], other.levels[j]], axis=1)
        return _Choices(
            (*self.knobs, *other.knobs), levels, self.saving[i] + other.saving[j], self.loss[i] + other.loss[j]
        ).front()


def _parts(knobs: tuple[Knob, ...], loss: Rows, saving: Rows) -> list[_Choices]:
    """Independent parts: single knobs, and blocks with what is inside them, where removal makes the inside free."""
    single = [_Choices((k,), np.arange(len(loss[k]))[:, None], saving[k], loss[k]) for k in range(len(knobs))]
    inside = dependents(knobs)
    taken = {i for inner in inside.values() for i in inner}
    parts = []
    for k, knob in enumerate(knobs):
        if k in taken:
            continue
        whole = single[k]
        if inside.get(k):
            gone = np.array(knob.kept) == 0
            kept, removed = whole.pick(~gone), whole.pick(gone)
            for i in inside[k]:
                kept, removed = kept.times(single[i]), removed.times(single[i].pick(np.arange(len(loss[i])) == 0))
            whole = kept.plus(removed)
        parts.append(whole.front())
    return parts


def solve(knobs: tuple[Knob, ...], loss: Rows, saving: Rows, needed: float) -> Levels | None:
    """The levels of least summed loss whose savings add up to `needed`: a multiple-choice knapsack.

    Dynamic programming over savings in 4,000ths of `needed`, rounded down: the answer saves enough, and no setting that
    saves 1 + len(knobs) / 4000 times as much costs less. Inner knobs of a removed block neither cost nor save.

    Args:
        knobs: the decisions.
        loss: per knob and level, at least 0, and 0 at level 0.
        saving: latency saved per knob and level, 0 at level 0.
        needed: what has to be saved in sum.

    Returns:
        Canonical levels, or None when not even the most pruned setting saves enough.
    """
    parts = _parts(knobs, loss, saving)
    if needed <= 1e-9 * sum(float(part.saving.max()) for part in parts):  # nothing to save: the cheapest option of each part
        needed, bins = 1.0, 0
    else:
        bins = BINS
    best = np.full(bins + 1, np.inf)  # least loss for a saving of this many bins; the last one: enough
    best[0] = 0.0
    trail = []
    for part in parts:
        after, pick, enough = np.full(bins + 1, np.inf), np.zeros(bins + 1, dtype=np.int64), 0
        steps = np.minimum(part.saving / needed * bins, bins).astype(np.int64)
        for option, (step, cost) in enumerate(zip(steps.tolist(), part.loss.tolist(), strict=True)):
            reached = best[: bins - step] + cost
            better = reached < after[step:bins]
            after[step:bins][better] = reached[better]
            pick[step:bins][better] = option
            source = bins - step + int(np.argmin(best[bins - step :]))  # whatever overshoots is enough
            if best[source] + cost < after[bins]:
                after[bins], pick[bins], enough = best[source] + cost, option, source
        best = after
        trail.append((part, steps, pick, enough))
    if not np.isfinite(best[bins]):
        return None
    levels, at = [0] * len(knobs), bins
    for part, steps, pick, enough in reversed(trail):
        option = int(pick[at])
        for knob, level in zip(part.knobs, part.levels[option].tolist(), strict=True):
            levels[knob] = level
        at = enough if at == bins else at - int(steps[option])
    return tuple(levels)


class LossModel:
    """What pruning costs in loss: single knobs as measured, each with a factor learned from whole models.

    The loss over the dense model's is modelled as `sum_k m_k d_k[level]`, d from single knobs and interpolation, with a
    Gaussian belief over m whose prior is one common factor: losses do not add up, but their proportions hold.
    """

    SPREAD = 0.5  # prior standard deviation of a knob's factor, relative to the common one
    NOISE = 0.1  # of a whole model's loss increase, relative to the best one's
    LEAST = 0.02  # the best one's loss increase counts as at least this much, which is what a reward set can resolve

    def __init__(self, knobs: tuple[Knob, ...], dense: Candidate, tried: Sequence[Candidate]) -> None:
        self._knobs, self._dense, self._tried = knobs, dense, tried
        self._inside = dependents(knobs)
        self._known: dict[tuple[int, int], float] = {}
        self._rows: Rows | None = None

    def _increase(self, candidate: Candidate) -> float:
        loss = min(candidate.loss, LOSS_CAP) if np.isfinite(candidate.loss) else LOSS_CAP
        return loss - self._dense.loss

    def observe_single(self, knob: int, level: int, candidate: Candidate) -> None:
        """One knob moved, all others dense."""
        self._known[knob, level] = max(self._increase(candidate), 0.0)
        self._rows = None

    def take(self, rows: Rows) -> None:
        """Loss increases per knob and level as they were found elsewhere; only their proportions matter."""
        self._rows = tuple(np.maximum.accumulate(np.maximum(row, 0.0)) for row in rows)

    def rows(self) -> Rows:
        """Loss increase per knob and level.

        What was not measured is interpolated, or grows with the square of the share. Never falling within a knob, and never
        quite free: what looks free alone is not free together.
        """
        if self._rows is not None:
            return self._rows
        shares = [np.array([1.0 - kept / knob.size for kept in knob.kept]) for knob in self._knobs]
        steep: dict[str, list[float]] = {}
        for (k, j), d in self._known.items():
            if j == max(level for knob, level in self._known if knob == k):
                steep.setdefault(self._knobs[k].kind, []).append(d / max(float(shares[k][j]), 1e-6) ** 2)
        everything = [d for values in steep.values() for d in values] or [1.0]
        typical = max(float(np.median(everything)), 1e-6)
        rows = []
        for k, knob in enumerate(self._knobs):
            levels = sorted(j for i, j in self._known if i == k)
            if levels:
                x = np.array([0.0, *(shares[k][j] for j in levels)])
                y = np.maximum.accumulate([0.0, *(self._known[k, j] for j in levels)])
                row = np.interp(shares[k], x, y)
                beyond = shares[k] > x[-1]
                row[beyond] = y[-1] * (shares[k][beyond] / x[-1]) ** 2
            else:
                row = float(np.median(steep.get(knob.kind, [typical]))) * shares[k] ** 2
            rows.append(np.maximum(row, 0.03 * typical * shares[k] ** 2))
        self._rows = tuple(rows)
        return self._rows

    def draw(self, rng: np.random.Generator, width: float) -> Rows:
        """The loss table as it may be: factors drawn from the belief, its spread times `width` (0 = the mean)."""
        rows = self.rows()
        wholes = [c for c in self._tried if sum(i > 0 for i in c.levels) > 2]
        mean, root = np.ones(len(rows)), self.SPREAD * np.eye(len(rows))
        if wholes:
            y = np.array([max(self._increase(c), 1e-6) for c in wholes])
            f = np.array([[row[i] for row, i in zip(rows, c.levels, strict=True)] for c in wholes])
            best = max(float(y.min()), self.LEAST)
            weight = np.exp(-(y / best - 1.0))  # what is far worse than the best lies in another regime
            common = float((weight * y * f.sum(1)).sum() / (weight * f.sum(1) ** 2).sum())
            f, y = f * common / (self.NOISE * best), y / (self.NOISE * best)  # in units of the noise
            precision = np.eye(len(rows)) / self.SPREAD**2 + (f * weight[:, None]).T @ f
            mean = 1.0 + np.linalg.solve(precision, (f * weight[:, None]).T @ (y - f.sum(1)))
            root = np.linalg.inv(np.linalg.cholesky(precision)).T
        factors = np.maximum(mean + width * (root @ rng.standard_normal(len(rows))), 0.05)
        return tuple(m * row for m, row in zip(factors, rows, strict=True))


def profile(log: SearchLog, evaluations: int) -> LossModel:
    """Dense, then single knobs, at most so many: every knob's middle level first, then the last ones, then the rest.

    Where the losses of single knobs are given, dense alone.
    """
    knobs = log.knobs
    dense = (0,) * len(knobs)
    model = LossModel(knobs, log.evaluate(dense), log.tried)
    if log.hints.losses is not None:
        model.take(log.hints.losses)
        return model
    depth = max(len(k.kept) for k in knobs)
    middle = [(i, len(k.kept) // 2) for i, k in enumerate(knobs) if len(k.kept) > 1]
    last = [(i, len(k.kept) - 1) for i, k in enumerate(knobs) if len(k.kept) > 1]
    rest = [(i, j) for j in range(1, depth) for i, k in enumerate(knobs) if j < len(k.kept)]
    for i, j in list(dict.fromkeys([*middle, *last, *rest]))[: max(0, evaluations - 1)]:
        model.observe_single(i, j, log.evaluate((*dense[:i], j, *dense[i + 1 :])))
    return model


def swap(log: SearchLog, levels: Levels, loss: Rows, limit: float, rng: np.random.Generator) -> Levels:
    """A neighbour: one or two knobs keep more, and others less until the predicted latency is within `limit`."""
    out = list(levels)
    pruned = [i for i, j in enumerate(out) if j > 0]
    for i in rng.permutation(pruned)[: rng.integers(1, 3)]:
        out[i] -= 1
    freed = {i for i, j in enumerate(levels) if out[i] < j}
    return tighten(log, tuple(out), loss, limit, rng, freed)


def relax(log: SearchLog, loss: Rows) -> Levels:
    """The leader with more kept, the knob that gains most for what it costs first, as long as it stays within the budget.

    A knapsack's plans rarely meet the budget to a level, and what they leave of it is accuracy given away.
    """
    knobs, out = log.knobs, log.leader.levels
    while True:
        looser = []
        for i, level in enumerate(out):
            if level == 0:
                continue
            option = canonical(knobs, (*out[:i], level - 1, *out[i + 1 :]))
            if log.beside_leader(option) <= log.settings.budget:
                cost = max(log.latency(option) - log.latency(out), 1e-6)
                looser.append(((loss[i][level] - loss[i][level - 1]) / cost, option))
        if not looser:
            return out
        out = max(looser)[1]


def tighten(
    log: SearchLog, levels: Levels, loss: Rows, limit: float, rng: np.random.Generator, freed: Collection[int] = ()
) -> Levels:
    """Knob after knob one level further, the cheapest of a few for what they save, until the prediction is within `limit`."""
    knobs, out = log.knobs, list(levels)
    while log.latency_estimate(tuple(out)) > limit:
        saving, _ = log.savings(float(log.size_counts(tuple(out))))
        open_ = [i for i, k in enumerate(knobs) if out[i] + 1 < len(k.kept) and i not in freed]
        if not open_:
            break
        some = rng.permutation(open_)[:4]
        prices = [(loss[i][out[i] + 1] - loss[i][out[i]]) / max(saving[i][out[i] + 1] - saving[i][out[i]], 1e-6) for i in some]
        out[some[int(np.argmin(prices))]] += 1
    return canonical(knobs, tuple(int(j) for j in out))


def evenly(knobs: Sequence[Knob], latency_estimate: Callable[[Levels], float], budget: float) -> Levels | None:
    """Uniform widths: the least share to take from all of them, with every block kept, that is within the budget by the table.

    None where even the largest is not.
    """
    for share in np.linspace(0.0, 1.0, 129):
        levels = tuple(0 if knob.kind == "block" else knob.level(float(share)) for knob in knobs)
        if latency_estimate(levels) <= budget:
            return levels
    return None


def run(log: SearchLog, until: int, rng: np.random.Generator) -> None:
    """Spend evaluations until `until` are spent: at most half on single knobs, one on even widths, the rest on plans and their
    neighbours.
    """
    settings, knobs = log.settings, log.knobs
    if until < 2:  # the dense network would be all there is to see
        log.evaluate(log.constraint.project(np.zeros(len(knobs))))
        return
    model = profile(log, max(1, until // 2))
    hard = settings.mode == "hard"
    # Soft mode has no budget: look where along the whole range of latencies the reward is highest.
    sweep = [] if hard else list(np.linspace(log.latency(log.constraint.fastest), log.latency.dense, 10)[:-1])
    stale, turn = 0, 0

    def proposal(turn: int, limits: list[float], rng: np.random.Generator) -> Levels:
        if turn == 1 and hard and (even := evenly(knobs, log.latency_estimate, settings.budget)) is not None:
            return even  # what a user would try first: what is taken must not be behind it
        centre = settings.budget if hard else log.latency(log.leader.levels)
        width = 0.0 if turn == 0 else 1.0 + 0.1 * stale
        limit = limits.pop() if limits else centre * (1.0 + 0.01 * (1 + 0.1 * stale) * rng.standard_normal() * (turn > 0))
        loss = model.draw(rng, width)
        if turn % 3 == 2:
            return swap(log, log.leader.levels, loss, limit, rng)
        if turn % 3 == 1 and turn > 1 and hard and not log.sized and excess(log.leader, settings) <= 0.0:
            looser = relax(log, loss)
            if not log.seen(looser):
                return looser
        saving, dense = log.savings(float(rng.uniform()) if log.sized else 0.0)
        levels = solve(knobs, loss, saving, dense - limit)
        if levels is not None and log.sized:  # what one knob saves in size, another cannot save again
            levels = tighten(log, levels, loss, limit, rng)
        return log.constraint.fastest if levels is None else levels

    while len(log.tried) < until and stale < PATIENCE:
        if turn % log.width == 0:
            twin, left = deepcopy(rng), sweep.copy()
            log.expect(proposal(turn + ahead, left, twin) for ahead in range(log.width))
        levels = proposal(turn, sweep, rng)
        turn += 1
        stale = stale + 1 if log.seen(levels) else 0
        log.evaluate(levels)
