"""Latency ratios of candidates, measured against the dense network in their own precision, as fractions of the float baseline."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cached_property

from .latency_cache import LatencyCache
from .meter import Meter
from .timing import Ratio

REPEATS = 5  # measurements of the reference, each in a fresh session of the runtime: every candidate's ratio is scaled by it
REPEATS_S = 30.0  # time limit for starting another one: engines have to be built each time
_KEY = "the dense network in the candidates' precision"


class ReferencedMeter(Meter):
    """A meter whose candidates are interleaved with a reference that is computed as they are.

    What slows a processor down from one moment to the next, such as work on the other thread of a core, slows int8 and float
    kernels differently. So candidates are compared with the latter, whose own fraction of the baseline is measured
    up to `REPEATS` times, once for all. One meter is open at a time: a board is lent to one.

    Args:
        open_meter: opens a meter against a file.
        baseline: the file that ratios are fractions of.
        reference: gives the dense network's file in the candidates' precision.
        cache: keeps the reference's fraction of the baseline.
    """

    def __init__(
        self, open_meter: Callable[[bytes], Meter], baseline: bytes, reference: Callable[[], bytes], cache: LatencyCache
    ) -> None:
        self._open, self._baseline, self._make_reference, self._cache = open_meter, baseline, reference, cache
        self._meter: Meter | None = None  # against the reference
        self._dense_ms = 0.0
        with closing(open_meter(baseline)) as meter:
            self.width = meter.width

    @cached_property
    def _reference(self) -> bytes:
        """The reference's file; making it may be an export."""
        return self._make_reference()

    @property
    def dense_ms(self) -> float:
        """Median latency of the baseline in milliseconds, measured once."""
        if not self._dense_ms:
            self.close()
            with closing(self._open(self._baseline)) as meter:
                self._dense_ms = meter.dense_ms
        return self._dense_ms

    def ratio(self, candidate: bytes) -> Ratio:
        """See `Meter.ratio`."""
        return self.ratios([candidate])[0]

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """See `Meter.ratios`."""
        if not candidates:
            return []
        unit = self._cache.ratio(_KEY) or self._measured()
        if self._meter is None:
            self._meter = self._open(self._reference)
        # where the unit is noisy, so is what is counted in it: the cache then keeps neither for long
        return [
            Ratio(found.value * unit.value, math.hypot(found.half_width, unit.half_width))
            for found in self._meter.ratios(candidates)
        ]

    def _measured(self) -> Ratio:
        """The reference's latency as a fraction of the baseline's."""
        self.close()
        file, began, found = self._reference, time.monotonic(), list[Ratio]()
        with closing(self._open(self._baseline)) as meter:
            while not found or (len(found) < REPEATS and time.monotonic() - began < REPEATS_S):
                found.append(meter.ratio(file))
            self._dense_ms = meter.dense_ms
        middle = sorted(found, key=lambda ratio: ratio.value)[len(found) // 2]
        spread = statistics.median(abs(ratio.value / middle.value - 1.0) for ratio in found)
        self._cache.put(_KEY, Ratio(middle.value, max(middle.half_width, spread)))
        unit = self._cache.ratio(_KEY)
        assert unit is not None  # it was put there
        return unit

    def close(self) -> None:
        """See `Meter.close`; the next ratio opens it again."""
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.close()
