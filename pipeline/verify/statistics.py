"""Intervals and tests for figures that are kept as counts or as samples: shares, paired differences, medians.

Two networks on the same images are paired: an image that both classify correctly, or both wrongly, does not tell them apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...devices.measure.stats import two_level_bootstrap
from ..errors import InputError
from ..signature import Metric
from ..types import Timing

if TYPE_CHECKING:  # torch comes with it
    from ..task.task import Judge

Interval = tuple[float, float]
_Z = 1.959964  # of the normal distribution, two-sided 95 %
_BISECTIONS = 60
RESAMPLES = 2000
CORPUS_RESAMPLES, LEAST_RESAMPLES, RESAMPLING_S = 200, 20, 60.0  # where each computes the metric again


def share_ci95(percent: float, samples: int) -> Interval:
    """95 % interval of a share counted over samples, in percent (Wilson 1927).

    Raises:
        ValueError: no samples.
    """
    if samples < 1:
        raise ValueError("a share of no samples")
    p, z2 = percent / 100.0, _Z * _Z / samples
    middle = (p + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(p * (1 - p) / samples + z2 / (4 * samples)) / (1 + z2)
    return 100.0 * max(middle - half, 0.0), 100.0 * min(middle + half, 1.0)


def paired_ci95(lost: int, won: int, samples: int) -> Interval:
    """95 % interval of (lost - won) / samples, in percent: Tango's score interval (1998, Statistics in Medicine 17, eq. 5).

    The Wald interval has no width where nothing differs and is too narrow for few samples; this one is neither.

    Args:
        lost: samples that only the first of two classifiers gets right.
        won: samples that only the second gets right.
        samples: all of them, on which both were asked.

    Raises:
        ValueError: no samples, or more that differ than there are.
    """
    if samples < 1 or min(lost, won) < 0 or lost + won > samples:
        raise ValueError(f"{lost} + {won} of {samples} samples differ")
    upper = _tango_bound(lost, won, samples)
    return -100.0 * _tango_bound(won, lost, samples), 100.0 * upper


def is_share(values: NDArray[np.float64]) -> bool:
    """Whether the values of single samples are 0 or 100: right or wrong."""
    return bool(np.isin(values, (0.0, 100.0)).all())


def drop_ci95(metric: Metric, dense: Judge, other: Judge, samples: int) -> tuple[Interval | None, str]:
    """95 % interval of the drop from one network to another on the same samples, and what it is; None where it is not known.

    Where the metric is a mean over samples: of their paired differences, by Tango's score where each is right or wrong, else by
    bootstrap. Where it is a figure of the whole set, such as mAP: a bootstrap over the samples, the metric computed again.
    """
    before, after = dense.per_sample(), other.per_sample()
    if before is not None and after is not None:
        drops = metric.drop(1.0, 0.0) * (before - after)
        if is_share(before) and is_share(after):
            lost, won = int((drops > 0).sum()), int((drops < 0).sum())
            return paired_ci95(lost, won, samples), "paired, over the test samples"
        rng = np.random.default_rng(0)
        means = [drops[rng.integers(0, samples, samples)].mean() for _ in range(RESAMPLES)]
        return _percentiles(means), "paired bootstrap over the test samples"
    found: list[float] = []
    rng, start = np.random.default_rng(0), time.monotonic()
    while len(found) < CORPUS_RESAMPLES and (len(found) < LEAST_RESAMPLES or time.monotonic() - start < RESAMPLING_S):
        picked = rng.integers(0, samples, samples)
        one, two = _over(dense, picked), _over(other, picked)
        if one is None or two is None:
            return None, "not known: the outputs of all test samples do not fit in the memory"
        found.append(metric.drop(one, two))
    known = [drop for drop in found if not math.isnan(drop)]
    if not known:
        return None, "not known: the metric has no value for samples drawn from the test samples"
    text = f"bootstrap over the test samples, {len(known)} times, the metric computed again"
    lost = len(found) - len(known)
    return _percentiles(known), f"{text}; {lost} draws on which it has no value are left out" if lost else text


def _over(judge: Judge, picked: NDArray[np.int64]) -> float | None:
    """See `Judge.over`; NaN where the metric fails, such as on samples of one class alone."""
    try:
        return judge.over(picked)
    except InputError:
        return math.nan


def _percentiles(values: Sequence[float]) -> Interval:
    low, high = np.nanpercentile(np.asarray(values, dtype=np.float64), [2.5, 97.5])
    return float(low), float(high)


def unpaired_differ(percent: float, samples: int, other_percent: float, other_samples: int) -> bool:
    """Whether two unpaired shares differ: Newcombe's 95 % interval of their difference (1998, method 10) excludes 0."""
    (high, high_ci), (low, low_ci) = sorted(
        ((percent, share_ci95(percent, samples)), (other_percent, share_ci95(other_percent, other_samples))), reverse=True
    )
    return high - low > math.hypot(high - high_ci[0], low_ci[1] - low)


def sign_test(lost: int, won: int) -> float:
    """p-value of "what differs is lost as often as won": McNemar's test in its exact form, two-sided."""
    total, fewer = lost + won, min(lost, won)
    tail: float = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    return min(2 * tail, 1.0)


def latency_ci95(latency: Timing, side: str) -> Interval:
    """95 % interval of a median latency, milliseconds, from the samples kept of it: processes first, then blocks within them.

    Args:
        latency: measured or emulated, with samples.
        side: "dense" or "artifact".

    Raises:
        ValueError: no samples.
    """
    samples = np.asarray(getattr(latency, f"{side}_samples_ms"), dtype=np.float64)
    if not len(samples):
        raise ValueError("no latency samples")
    _, low, high = two_level_bootstrap(np.split(samples, _session_ends(latency, len(samples))), resamples=1000, seed=0)
    return float(low), float(high)


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals have a point in common."""
    return max(one[0], other[0]) <= min(one[1], other[1])


def evenly_spaced(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` positions, ascending, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def _tango_bound(lost: int, won: int, samples: int) -> float:
    """The upper end: the largest difference in [estimate, 1] that the score test does not reject, by bisection."""
    inside, outside = (lost - won) / samples, 1.0
    for _ in range(_BISECTIONS):
        tried = (inside + outside) / 2
        b = (2 * samples - lost + won) * tried - lost - won
        c = -won * tried * (1 - tried)
        share = (math.sqrt(b * b - 8 * samples * c) - b) / (4 * samples)  # won, most likely, if `tried` is the difference
        variance = samples * (2 * share + tried * (1 - tried))
        if (samples * tried - lost + won) ** 2 <= _Z * _Z * variance:
            inside = tried
        else:
            outside = tried
    return inside


def _session_ends(latency: Timing, kept: int) -> Sequence[int]:
    """Where one process's samples end and the next one's begin, among those that were kept evenly spaced."""
    try:
        pairs = [int(text) for text in latency.environment["pairs_per_session"].split(",")]
    except (KeyError, ValueError):
        return []
    ends = np.searchsorted(evenly_spaced(sum(pairs), kept), np.cumsum(pairs)[:-1])
    return [int(end) for end in np.unique(ends[(ends > 0) & (ends < kept)])]
