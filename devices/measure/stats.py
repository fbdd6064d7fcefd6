"""Statistics of paired latency samples: ratios, intervals, percentiles, drift. Pure numpy.

A ratio here is always baseline / candidate of one round, so 2.0 means twice as fast. Samples of one process are
autocorrelated and processes differ from one another: an interval that takes them for independent is far too narrow
(it covered the truth 40-80 % of the time where this one covers 93-99 %, see tests/devices/test_stats.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# The bootstrap of a median of S session medians spans at most their range, which covers the centre with probability
# 1 - 2^(1-S): 94 % from five sessions on, but 75 % with three. Below five, session medians are therefore spread by
# sqrt(S/(S-1)) * t(0.975, S-1) / z(0.975) (Davison & Hinkley 1997, sections 2.3 and 3.8).
_SMALL_SAMPLE = {2: 9.168, 3: 2.689, 4: 1.875}
_CHUNK = 4_000_000  # array elements at once


def paired_ratios(baseline: FloatArray, candidate: FloatArray) -> FloatArray:
    """Ratios baseline / candidate, round by round; > 1 where the candidate is faster."""
    return np.asarray(baseline, dtype=np.float64) / np.asarray(candidate, dtype=np.float64)


def two_level_bootstrap(
    sessions: Sequence[FloatArray], *, block: int = 10, resamples: int = 2000, seed: int
) -> tuple[float, float, float]:
    """(median, low, high): the median of the sessions' medians and its 95 % percentile interval.

    Resamples sessions, and inside each of them circular blocks of consecutive pairs (Künsch 1989; Politis & Romano
    1992), so that neither what differs from process to process nor what lasts for some pairs is lost. Sessions weigh
    the same whatever their length. One session gives an interval for that session only.

    Args:
        sessions: one array of ratios for each fresh process, in the order they were measured, all > 0.
        block: consecutive pairs kept together.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no sessions, or an empty one.
    """
    if not sessions or any(len(s) == 0 for s in sessions):
        raise ValueError("sessions: none, or an empty one")
    rng = np.random.default_rng(seed)
    medians = np.array([np.median(s) for s in sessions])
    centre = float(np.median(medians))
    inner = np.stack([_block_medians(np.asarray(s, dtype=np.float64), block, resamples, rng) for s in sessions])
    count = len(sessions)
    inner *= ((medians / centre) ** (_SMALL_SAMPLE.get(count, 1.0) - 1.0))[:, None]
    picked = rng.integers(0, count, (resamples, count))
    draws = rng.integers(0, resamples, (resamples, count))
    low, high = np.quantile(np.median(inner[picked, draws], axis=1), [0.025, 0.975])
    return centre, min(float(low), centre), max(float(high), centre)


def half_width(values: FloatArray, *, block: int = 10, resamples: int = 200, seed: int = 0) -> float:
    """Half the width of the 95 % interval of one session's median, as a share of it: when to stop sampling."""
    median, low, high = two_level_bootstrap([values], block=block, resamples=resamples, seed=seed)
    return (high - low) / 2 / median


def percentiles(samples: FloatArray) -> tuple[float, float, float]:
    """The 50th, 90th and 99th percentile, in the unit of the samples."""
    p50, p90, p99 = np.percentile(samples, [50, 90, 99])
    return float(p50), float(p90), float(p99)


def drift(baseline: FloatArray, *, window: int = 10) -> float:
    """How much the baseline slowed down (> 0) or sped up over a session, as a share of its median.

    Slope of the medians of windows of consecutive samples by Theil and Sen (median of pairwise slopes), times the
    length of the session; 0 where there are fewer than three windows.
    """
    count = len(baseline) // window
    if count < 3:
        return 0.0
    medians = np.median(np.asarray(baseline[: count * window], dtype=np.float64).reshape(count, window), axis=1)
    first, second = np.triu_indices(count, 1)
    slope = np.median((medians[second] - medians[first]) / (second - first))
    return float(slope * count / np.median(medians))


def session_spread(sessions: Sequence[FloatArray]) -> float:
    """Range of the sessions' medians as a share of their median."""
    medians = np.array([np.median(s) for s in sessions])
    return float((medians.max() - medians.min()) / np.median(medians))


def _block_medians(values: FloatArray, block: int, resamples: int, rng: np.random.Generator) -> FloatArray:
    """Medians of circular block resamples of one session, (resamples,)."""
    count = len(values)
    length = max(1, min(block, count // 3))  # a block of everything would always give the same median
    out = np.empty(resamples)
    step = max(1, _CHUNK // count)
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        starts = rng.integers(0, count, (rows, -(-count // length)))
        index = (starts[..., None] + np.arange(length)).reshape(rows, -1)[:, :count] % count
        out[begin : begin + rows] = np.median(values[index], axis=1)
    return out
