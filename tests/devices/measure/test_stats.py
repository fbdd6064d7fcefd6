"""The intervals cover what they claim to cover."""

import numpy as np
import pytest
from edge_compress.devices.measure import stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

positive = st.floats(0.1, 10.0)
one_session = arrays(np.float64, st.integers(1, 40), elements=positive)


def synthetic(rng, sessions, pairs, *, session_effect, autocorrelation=0.5, noise=0.05, truth=2.0):
    """Ratios around `truth` as processes give them: a level of its own for each, autocorrelated noise, some outliers."""
    out = []
    for _ in range(sessions):
        steps = rng.normal(size=pairs)
        level = np.empty(pairs)
        level[0] = steps[0]
        for i in range(1, pairs):
            level[i] = autocorrelation * level[i - 1] + np.sqrt(1 - autocorrelation**2) * steps[i]
        spikes = np.where(rng.random(pairs) < 0.1, rng.exponential(5 * noise, pairs) * rng.choice([-1, 1], pairs), 0.0)
        out.append(truth * np.exp(session_effect * rng.normal() + noise * level + spikes))
    return out


def iid_interval(sessions, rng, resamples=200):
    pooled = np.concatenate(sessions)
    medians = np.median(pooled[rng.integers(0, len(pooled), (resamples, len(pooled)))], axis=1)
    return np.quantile(medians, [0.025, 0.975])


@pytest.mark.parametrize(("sessions", "effect"), [(3, 0.03), (5, 0.0), (5, 0.03), (8, 0.01)])
def test_interval_covers_the_truth_about_as_often_as_it_says_and_iid_does_not(sessions, effect):
    rng = np.random.default_rng(7)
    trials, ours, iid = 80, 0, 0
    for trial in range(trials):
        data = synthetic(rng, sessions, 60, session_effect=effect)
        _, low, high = stats.two_level_bootstrap(data, resamples=200, seed=trial)
        ours += low <= 2.0 <= high
        naive_low, naive_high = iid_interval(data, rng)
        iid += naive_low <= 2.0 <= naive_high
    assert ours / trials >= 0.90
    assert iid / trials <= ours / trials - 0.10


def test_blocks_widen_the_interval_of_autocorrelated_pairs():
    data = synthetic(np.random.default_rng(0), 1, 400, session_effect=0.0, autocorrelation=0.9)
    assert stats.half_width(data[0], block=20) > 1.5 * stats.half_width(data[0], block=1)


def test_interval_narrows_with_pairs_and_with_sessions():
    rng = np.random.default_rng(3)
    few, many = rng.normal(2, 0.1, 50), rng.normal(2, 0.1, 2000)
    assert stats.half_width(many) < stats.half_width(few) / 3
    apart = [rng.normal(2 + shift, 0.01, 50) for shift in rng.normal(0, 0.05, 30)]
    _, low5, high5 = stats.two_level_bootstrap(apart[:5], seed=0)
    _, low30, high30 = stats.two_level_bootstrap(apart, seed=0)
    assert high30 - low30 < high5 - low5


def test_difference_between_sessions_is_not_averaged_away():
    same = [np.full(200, 2.0) + np.linspace(-0.01, 0.01, 200) for _ in range(5)]
    apart = [s * f for s, f in zip(same, (0.9, 0.95, 1.0, 1.05, 1.1), strict=True)]
    _, low, high = stats.two_level_bootstrap(apart, seed=1)
    assert low < 1.85
    assert high > 2.15
    _, low, high = stats.two_level_bootstrap(same, seed=1)
    assert high - low < 0.02


@given(st.lists(one_session, min_size=1, max_size=5), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_interval_contains_the_median_and_stays_within_reach_of_the_data(sessions, seed):
    median, low, high = stats.two_level_bootstrap(sessions, resamples=50, seed=seed)
    assert 0 < low <= median <= high
    assert median == np.median([np.median(s) for s in sessions])
    if len(sessions) in (1, 5):  # in between, the small-sample factor reaches further
        assert min(s.min() for s in sessions) <= low * (1 + 1e-12)
        assert high <= max(s.max() for s in sessions) * (1 + 1e-12)


@given(st.lists(one_session, min_size=1, max_size=4), st.integers(-8, 8))
@settings(deadline=None, max_examples=40)
def test_interval_scales_with_the_ratios(sessions, power):
    scale = 2.0**power
    plain = stats.two_level_bootstrap(sessions, resamples=50, seed=0)
    scaled = stats.two_level_bootstrap([s * scale for s in sessions], resamples=50, seed=0)
    np.testing.assert_allclose(scaled, np.array(plain) * scale, rtol=1e-9)


def test_same_seed_gives_the_same_interval_and_other_seeds_others():
    data = synthetic(np.random.default_rng(0), 5, 50, session_effect=0.01)
    assert stats.two_level_bootstrap(data, seed=4) == stats.two_level_bootstrap(data, seed=4)
    assert len({stats.two_level_bootstrap(data, resamples=100, seed=seed) for seed in range(8)}) > 1


def test_long_sessions_in_pieces_give_a_sound_interval():
    data = np.random.default_rng(0).normal(2.0, 0.2, 40_000)  # more than is resampled at once
    median, low, high = stats.two_level_bootstrap([data], resamples=250, seed=0)
    assert 1.99 < low < median < high < 2.01


@pytest.mark.parametrize("pairs", [2, 5, 10, 12])
def test_few_pairs_do_not_look_certain(pairs):
    assert stats.half_width(np.linspace(1.0, 2.0, pairs)) > 0.05


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="none"):
        stats.two_level_bootstrap([], seed=0)
    with pytest.raises(ValueError, match="empty"):
        stats.two_level_bootstrap([np.array([1.0]), np.array([])], seed=0)


def test_ratio_is_above_one_where_the_candidate_is_faster():
    np.testing.assert_array_equal(stats.paired_ratios(np.array([4.0, 6.0]), np.array([2.0, 12.0])), [2.0, 0.5])


def test_percentiles_are_in_order_and_right():
    assert stats.percentiles(np.arange(101.0)) == (50.0, 90.0, 99.0)


@given(st.floats(-0.5, 0.5), st.floats(1.0, 1e9))
@settings(deadline=None, max_examples=30)
def test_drift_is_the_slope_as_a_share_whatever_the_unit(share, level):
    ramp = level * (1 + share * np.linspace(-0.5, 0.5, 200))
    assert stats.drift(ramp) == pytest.approx(share, abs=0.01)


def test_drift_is_not_moved_by_spikes_and_is_zero_for_few_samples():
    flat = np.random.default_rng(0).normal(100, 1, 300)
    flat[::17] *= 10
    assert abs(stats.drift(flat)) < 0.02
    assert stats.drift(np.arange(1.0, 20.0)) == 0.0


def test_session_spread():
    assert stats.session_spread([np.full(9, 1.9), np.full(9, 2.0), np.full(9, 2.2)]) == pytest.approx(0.15)
