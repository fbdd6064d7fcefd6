"""Intervals cover what they claim to, tests reject what they should; checked by simulation and by published examples."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.signature import Metric
from edge_compress.pipeline.verify.statistics import (
    drop_ci95,
    evenly_spaced,
    latency_ci95,
    overlap,
    paired_ci95,
    share_ci95,
    sign_test,
    unpaired_differ,
)
from fake_run import fake_timing
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

pairs = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 400)).filter(lambda p: sum(p) > 0)

# --- paired differences -----------------------------------------------------------------------------------------------


def test_the_paired_interval_is_tangos() -> None:
    # airway hyper-responsiveness before and after transplantation, Bentur et al. 2009; interval as Fagerland et al. 2014 give it
    assert paired_ci95(1, 7, 21) == pytest.approx((-51.7, -2.6), abs=0.05)


@pytest.mark.parametrize("count", [10, 50, 359])
@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.01, 0.0), (0.02, 0.01), (0.05, 0.05), (0.3, 0.05)])
def test_the_paired_interval_holds_the_truth_as_often_as_it_claims(count: int, lost: float, won: float) -> None:
    rng = np.random.default_rng(count)
    drawn = rng.multinomial(count, [lost, won, 1 - lost - won], size=4000)
    truth = 100 * (lost - won)
    intervals = {pair: paired_ci95(*pair, count) for pair in {(int(a), int(b)) for a, b, _ in drawn}}
    held = [intervals[int(a), int(b)][0] <= truth <= intervals[int(a), int(b)][1] for a, b, _ in drawn]
    assert np.mean(held) > 0.93


@given(pairs)
def test_the_paired_interval_never_vanishes_and_holds_the_estimate(given: tuple[int, int, int]) -> None:
    lost, won, same = given
    count = lost + won + same
    low, high = paired_ci95(lost, won, count)
    assert -100 <= low < high <= 100
    assert low <= 100 * (lost - won) / count + 1e-9
    assert high >= 100 * (lost - won) / count - 1e-9
    assert paired_ci95(won, lost, count) == pytest.approx((-high, -low))


@given(pairs)
def test_the_paired_interval_shrinks_with_more_images_of_the_same_kind(given: tuple[int, int, int]) -> None:
    lost, won, same = given
    count = lost + won + same
    widths = [paired_ci95(k * lost, k * won, k * count) for k in (1, 3, 9)]
    assert [high - low for low, high in widths] == sorted((high - low for low, high in widths), reverse=True)


@pytest.mark.parametrize("wrong", [(1, 0, 0), (3, 2, 4), (-1, 0, 5)])
def test_more_differences_than_images_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="samples differ"):
        paired_ci95(*wrong)


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1.0), (5, 5, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (1, 9, 0.0215)])
def test_the_sign_test_is_the_binomial_one(lost: int, won: int, p: float) -> None:
    assert sign_test(lost, won) == pytest.approx(p, abs=1e-4)
    assert sign_test(won, lost) == sign_test(lost, won)


def test_the_sign_test_rejects_chance_no_more_often_than_it_claims() -> None:
    rng = np.random.default_rng(0)
    found = [sign_test(int(lost), 40 - int(lost)) for lost in rng.binomial(40, 0.5, 2000)]
    assert np.mean(np.array(found) < 0.05) <= 0.05


# --- shares and medians -----------------------------------------------------------------------------------------------


def test_shares_that_differ_by_more_than_chance_are_told_apart_though_their_intervals_overlap() -> None:
    assert overlap(share_ci95(99.44, 359), share_ci95(96.9, 359))
    assert unpaired_differ(99.44, 359, 96.9, 359)
    assert unpaired_differ(96.9, 359, 99.44, 359)
    assert not unpaired_differ(99.44, 359, 98.6, 359)
    assert not unpaired_differ(91.56, 5000, 91.56, 5000)


def test_positions_are_evenly_spaced_and_no_more_than_there_are() -> None:
    assert evenly_spaced(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert evenly_spaced(3, 10).tolist() == [0, 1, 2]
    assert all(math.isclose(step, 10, abs_tol=1) for step in np.diff(evenly_spaced(1000, 100)))


@pytest.mark.parametrize(
    ("percent", "count", "low", "high"), [(50.0, 100, 40.383, 59.617), (0.0, 10, 0.0, 27.753), (100.0, 10, 72.247, 100.0)]
)
def test_the_interval_of_a_share_is_wilsons(percent: float, count: int, low: float, high: float) -> None:
    assert share_ci95(percent, count) == pytest.approx((low, high), abs=1e-3)  # as statsmodels' proportion_confint gives it


@given(st.integers(1, 5000), st.floats(0, 1))
def test_an_interval_holds_its_share_and_shrinks_with_more_images(count: int, share: float) -> None:
    percent = 100.0 * round(share * count) / count
    low, high = share_ci95(percent, count)
    assert -1e-9 <= low <= percent + 1e-9
    assert percent - 1e-9 <= high <= 100 + 1e-9
    more = share_ci95(percent, 4 * count)
    assert more[1] - more[0] < high - low
    with pytest.raises(ValueError, match="no samples"):
        share_ci95(percent, 0)


class _Refusing:
    """A judge of a figure that has no value for some of the draws: a correlation, say, of samples that are all one."""

    def __init__(self, value: float, fails: int) -> None:
        self.value, self.fails, self.asked = value, fails, 0

    def per_sample(self) -> None:
        return None

    def over(self, picked: NDArray[np.int64]) -> float:
        self.asked += 1
        if self.asked % 10 < self.fails:
            raise InputError("metric().compute()", found="ZeroDivisionError")
        return self.value + 0.01 * float(picked.mean())


def test_a_metric_that_fails_on_some_draws_does_not_end_a_finished_run() -> None:
    judges: list[Any] = [_Refusing(0.9, 3), _Refusing(0.8, 3)]
    interval, what = drop_ci95(Metric("r", ""), *judges, 30)
    assert interval == pytest.approx((0.1, 0.1))
    assert f"{round(0.7 * judges[0].asked)} times" in what
    interval, what = drop_ci95(Metric("r", ""), *[cast(Any, _Refusing(0.9, 10)) for _ in range(2)], 30)
    assert interval is None
    assert what.startswith("not known: the metric has no value")


def test_a_latencys_interval_knows_processes() -> None:
    rng = np.random.default_rng(0)
    sessions = [1.0 + 0.2 * i + 0.01 * rng.random(100) for i in range(5)]  # processes differ, samples within them do not
    samples = np.concatenate(sessions).tolist()
    known = {"pairs_per_session": "100,100,100,100,100"}
    told = fake_timing(artifact_samples_ms=tuple(samples), environment=known)
    low, high = latency_ci95(told, "artifact")
    assert low < 1.3
    assert high > 1.5
    blind = latency_ci95(fake_timing(artifact_samples_ms=tuple(samples), environment={}), "artifact")
    assert blind[1] - blind[0] < high - low
    thinned = fake_timing(artifact_samples_ms=tuple(samples[::5]), environment=known)
    assert latency_ci95(thinned, "artifact") == pytest.approx((low, high), abs=0.1)
    with pytest.raises(ValueError, match="no latency samples"):
        latency_ci95(fake_timing(artifact_samples_ms=()), "artifact")


def test_intervals_meet_where_they_have_a_point_in_common() -> None:
    assert overlap((1, 2), (2, 3))
    assert overlap((1, 4), (2, 3))
    assert not overlap((1, 2), (2.1, 3))
