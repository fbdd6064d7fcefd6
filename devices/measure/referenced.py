"""Ratios of candidates against the dense network in their own precision, told as shares of the float baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cached_property

from .latency_cache import LatencyCache
from .meter import Meter
from .timing import Ratio

REPEATS = 5  # of the reference against the baseline, each loaded anew: every candidate's latency is a multiple of it
REPEATS_S = 30.0  # none is begun later: where an engine has to be built each time, one is what there is time for


class ReferencedMeter(Meter):
    """A meter whose candidates take turns with a reference that is computed as they are.

    What slows a processor down from one moment to the next, such as work on the other thread of a core, slows int8 and float
    kernels differently: within a minute the ratio of a small network in int8 to its float baseline moved by 25 %, that to the
    dense network in int8 by 3 %. So candidates are compared with the latter, whose own share of the baseline is measured
    up to `REPEATS` times, once for all.

    Args:
        open_meter: opens a meter against a file.
        baseline: the file that ratios are shares of.
        reference: gives the dense network's file in the candidates' precision.
        cache: keeps the reference's share of the baseline.
    """

    def __init__(
        self, open_meter: Callable[[bytes], Meter], baseline: bytes, reference: Callable[[], bytes], cache: LatencyCache
    ) -> None:
        self._open, self._reference, self._cache = open_meter, reference, cache
        self._float = open_meter(baseline)
        self.width = self._float.width

    @cached_property
    def _same(self) -> Meter:
        return self._open(self._reference())

    @cached_property
    def _share(self) -> float:
        """The reference's latency as a share of the baseline's."""
        key = "the dense network in the candidates' precision"
        known = self._cache.get(key)
        if known is not None:
            return known
        file, began, found = self._reference(), time.monotonic(), list[Ratio]()
        while not found or (len(found) < REPEATS and time.monotonic() - began < REPEATS_S):
            found.append(self._float.ratio(file))
        middle = sorted(found, key=lambda ratio: ratio.value)[len(found) // 2]
        spread = statistics.median(abs(ratio.value / middle.value - 1.0) for ratio in found)
        self._float.close()  # a small board need not hold it meanwhile
        return self._cache.put(key, Ratio(middle.value, max(middle.half_width, spread)))

    @property
    def dense_ms(self) -> float:
        """Median latency of the baseline in milliseconds."""
        return self._float.dense_ms

    def ratio(self, candidate: bytes) -> Ratio:
        """See `Meter.ratio`."""
        return self._told(self._same.ratio(candidate))

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """See `Meter.ratios`."""
        return [self._told(found) for found in self._same.ratios(candidates)] if candidates else []

    def _told(self, found: Ratio) -> Ratio:
        return Ratio(found.value * self._share, found.half_width)

    def close(self) -> None:
        """See `Meter.close`."""
        with closing(self._float):
            if "_same" in self.__dict__:
                self._same.close()
