"""Intervals of figures that a report holds as counts or as samples."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ...devices.measure.stats import two_level_bootstrap
from .words import Json

Interval = tuple[float, float]
_Z = 1.959964  # of the normal distribution, two-sided 95 %


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


def latency_ci95(latency: Json, side: str) -> Interval:
    """95 % interval of a median latency, milliseconds, from the samples kept of it: processes first, then blocks within them.

    Args:
        latency: of a target, in report.json; measured or emulated, with samples.
        side: "dense" or "artifact".

    Raises:
        ValueError: no samples.
    """
    samples = np.asarray(latency[f"{side}_samples_ms"], dtype=np.float64)
    if not len(samples):
        raise ValueError("no latency samples")
    _, low, high = two_level_bootstrap(np.split(samples, _session_ends(latency, len(samples))), resamples=1000, seed=0)
    return float(low), float(high)


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals have a point in common."""
    return max(one[0], other[0]) <= min(one[1], other[1])


def _session_ends(latency: Json, kept: int) -> NDArray[np.int64]:
    """Where one process's samples end and the next one's begin, among those that were kept evenly spaced."""
    try:
        pairs = [int(text) for text in str(latency["environment"]["pairs_per_session"]).split(",")]
    except (KeyError, ValueError):
        return np.empty(0, np.int64)
    total = sum(pairs)
    at = np.unique(np.linspace(0, total - 1, kept).astype(int))
    ends = np.searchsorted(at, np.cumsum(pairs)[:-1])
    return np.unique(ends[(ends > 0) & (ends < kept)]).astype(np.int64)
