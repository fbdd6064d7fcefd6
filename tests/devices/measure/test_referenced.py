"""Candidates are interleaved with the dense network in their own precision; ratios are fractions of the float baseline."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.devices.measure.meter import Meter
from edge_compress.devices.measure.referenced import REPEATS, ReferencedMeter
from edge_compress.devices.measure.timing import Ratio

FLOAT, INT8 = b"float", b"int8"


class Processor:
    """Milliseconds of files by their bytes; int8 is slower by `weather`, which changes with each measurement.

    Like a board it is lent to one meter at a time, from its first question until it is closed.
    """

    def __init__(self, weather: list[float], half_width: float = 0.01) -> None:
        self.weather, self.half_width, self.asked = weather, half_width, []
        self.lent: Meter | None = None

    def ms(self, file: bytes) -> float:
        alone = {FLOAT: 10.0, INT8: 6.0, b"half": 3.0}[file]
        return alone if file == FLOAT else alone * self.weather[len(self.asked) % len(self.weather)]

    def meter(self, baseline: bytes) -> Meter:
        made = self

        class One(Meter):
            width = 2

            def _take(self) -> None:
                assert made.lent in (None, self), "the board is in use"
                made.lent = self

            @property
            def dense_ms(self) -> float:
                self._take()
                return made.ms(baseline)

            def ratio(self, candidate: bytes) -> Ratio:
                self._take()
                found = Ratio(made.ms(candidate) / made.ms(baseline), made.half_width)
                made.asked.append((baseline, candidate))
                return found

            def close(self) -> None:
                made.lent = None if made.lent is self else made.lent

        return One()


def metered(processor: Processor, cache: LatencyCache) -> ReferencedMeter:
    return ReferencedMeter(processor.meter, FLOAT, lambda: INT8, cache)


def test_what_slows_int8_down_for_a_while_is_in_no_candidates_ratio(tmp_path: Path) -> None:
    processor = Processor([1.0, 1.3, 1.0, 1.1, 1.0])
    meter = metered(processor, LatencyCache({"device": "local"}, tmp_path))
    found = [meter.ratio(b"half").value for _ in range(5)]
    assert found == pytest.approx([0.3] * 5)
    assert [ratio.value for ratio in meter.ratios([b"half", INT8])] == pytest.approx([0.3, 0.6])
    assert processor.asked.count((FLOAT, INT8)) == REPEATS
    assert (FLOAT, b"half") not in processor.asked
    assert meter.width == 2


def test_the_references_fraction_is_measured_once_for_all_runs_and_nothing_stays_open(tmp_path: Path) -> None:
    first, second = Processor([1.0]), Processor([2.0])
    for processor in (first, second):
        meter = metered(processor, LatencyCache({"device": "local"}, tmp_path))
        assert meter.ratio(b"half").value == pytest.approx(0.3)
        assert meter.dense_ms == 10.0  # asked for after the first candidates, as for a budget in milliseconds
        assert meter.ratio(b"half").value == pytest.approx(0.3)
        meter.close()
        assert processor.lent is None
    assert (FLOAT, INT8) not in second.asked


def test_what_is_counted_in_a_noisy_unit_is_noisy_itself(tmp_path: Path) -> None:
    meter = metered(Processor([1.0], half_width=0.06), LatencyCache({"device": "local"}, tmp_path))
    assert meter.ratio(b"half").half_width == pytest.approx(0.06 * 2**0.5)


def test_where_each_repeat_takes_long_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_compress.devices.measure.referenced.REPEATS_S", 0.0)
    processor = Processor([1.0])
    assert metered(processor, LatencyCache({"device": "local"}, tmp_path)).ratio(b"half").value == pytest.approx(0.3)
    assert processor.asked.count((FLOAT, INT8)) == 1


def test_nothing_is_measured_before_the_first_candidate(tmp_path: Path) -> None:
    processor = Processor([1.0])
    meter = metered(processor, LatencyCache({"device": "local"}, tmp_path))
    assert meter.ratios([]) == []
    meter.close()
    assert processor.asked == []
