"""Raw samples become the right figures, and poor conditions are said."""

from dataclasses import replace

import numpy as np
import pytest
from edge_compress.devices.measure.timing import Samples, TimingSession, TimingSettings, build_timing, uncertain
from edge_compress.pipeline.codec import from_json, to_json
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.types import Kind, Timing

SETTINGS = TimingSettings(resamples=200)


def samples(rng, ms, rounds, *, wall_over_cpu=1.0, ramp=0.0, wall_ramp=0.0):
    cpu = ms * 1e6 * (1 + ramp * np.linspace(-0.5, 0.5, rounds)) * rng.normal(1, 0.004, rounds)
    return Samples(wall_ns=cpu * wall_over_cpu * (1 + wall_ramp * np.linspace(-0.5, 0.5, rounds)), cpu_ns=cpu, k=1)


def session(rng, baseline_ms=4.0, candidate_ms=2.0, rounds=60, **baseline):
    return TimingSession(
        baseline=samples(rng, baseline_ms, rounds, **baseline),
        candidates=(samples(rng, candidate_ms, rounds),),
        stop="converged",
        warmup_s=0.1,
        temperatures_c=((40.0, 55.5),),
        frequencies_mhz=((1200.0,), (2400.0,)),
        peak_rss_bytes=1,
        machine={"cpu": "a cpu", "governor": "performance", "runtime_version": "9.9"},
    )


def timing(sessions, settings=SETTINGS) -> Timing:
    control = session(np.random.default_rng(99), 4.0, 4.0 / 1.03)
    return build_timing("board", sessions, control, settings)


def test_figures_of_a_quiet_device():
    rng = np.random.default_rng(0)
    result = timing([session(rng) for _ in range(5)])
    assert result.speedup.median == pytest.approx(2.0, rel=0.01)
    assert 1.98 < result.speedup.ci95[0] < result.speedup.ci95[1] < 2.02
    assert result.dense.p50_ms == pytest.approx(4.0, rel=0.01)
    assert result.artifact.p50_ms == pytest.approx(2.0, rel=0.01)
    assert result.artifact.p50_ms < result.artifact.p90_ms < result.artifact.p99_ms
    assert result.noise_floor == pytest.approx(0.03, abs=0.003)
    assert (result.device, result.kind, result.sessions, result.pairs, result.threads) == ("board", Kind.MEASURED, 5, 300, 1)
    assert result.quality == ()
    assert from_json(Timing, to_json(result)) == result


def test_environment_carries_the_machine_and_the_protocol():
    env = timing([session(np.random.default_rng(0))] * 5, replace(SETTINGS, affinity=(1,), seed=7)).environment
    assert env["cpu"] == "a cpu"
    assert env["runtime_version"] == "9.9"
    assert env["temperature_max_c"] == "55.5"
    assert env["frequency_mhz"] == "1200-2400"
    assert env["affinity"] == "1"
    assert env["pairs_per_session"] == "60,60,60,60,60"
    assert "seed 7" in env["bootstrap"]
    assert float(env["speedup_cpu_time"]) == pytest.approx(2.0, rel=0.01)


def test_no_difference_is_called_inconclusive_and_nothing_else():
    rng = np.random.default_rng(1)
    result = timing([session(rng, 4.0, 4.0) for _ in range(5)])
    assert result.speedup.ci95[0] <= 1.0 <= result.speedup.ci95[1]
    assert result.quality == ("inconclusive",)


def test_waiting_for_the_core_is_called_noisy():
    rng = np.random.default_rng(1)
    assert timing([session(rng, wall_over_cpu=1.2) for _ in range(5)]).quality == ("noisy",)


def test_sessions_that_disagree_are_called_noisy():
    rng = np.random.default_rng(1)
    assert timing([session(rng, 4.0, 2.0 * f) for f in (0.93, 0.97, 1.0, 1.03, 1.06)]).quality == ("noisy",)


def test_a_throttled_core_is_drift_in_either_direction_and_other_load_is_not():
    rng = np.random.default_rng(1)
    calm = [session(rng) for _ in range(4)]
    assert timing([*calm, session(rng, ramp=0.09)]).quality == ("drift",)
    assert timing([*calm, session(rng, ramp=-0.09)]).quality == ("drift",)
    assert timing([*calm, session(rng, wall_ramp=0.09)]).quality == ()


def test_kept_samples_are_few_and_from_every_session():
    rng = np.random.default_rng(2)
    result = timing([session(rng, 4.0 + n, 2.0 + n / 2, rounds=400) for n in range(5)])
    assert len(result.dense_samples_ms) == len(result.artifact_samples_ms) == 500
    np.testing.assert_allclose(np.divide(result.dense_samples_ms, result.artifact_samples_ms), 2.0, rtol=0.05)
    assert min(result.dense_samples_ms) < 4.5 < 7.5 < max(result.dense_samples_ms)


def interrupted(result: TimingSession, share: float) -> TimingSession:
    """The same session with the baseline's wall time tripled in a share of the rounds."""
    base = result.baseline
    hit = np.arange(len(base.wall_ns)) < share * len(base.wall_ns)
    return replace(result, baseline=replace(base, wall_ns=np.where(hit, 3 * base.wall_ns, base.wall_ns)))


@pytest.mark.parametrize("share", [0.0, 0.6, 0.88, 1.0])
def test_quick_ratio_survives_interruptions_that_mislead_the_plain_one(share):
    found = interrupted(session(np.random.default_rng(3)), share)
    assert np.median(found.undisturbed()) == pytest.approx(2.0, rel=0.01)
    if share > 0.5:
        assert np.median(found.ratios()) > 5.0
    if share < 0.9:
        assert found.baseline.quiet_ms() == pytest.approx(4.0, rel=0.01)


def test_without_a_cpu_clock_every_round_counts():
    found = session(np.random.default_rng(3))
    blind = replace(found, baseline=replace(found.baseline, cpu_ns=np.zeros(60)))
    np.testing.assert_array_equal(blind.undisturbed(), blind.ratios())
    assert timing([blind] * 5).quality == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"threads": 2000},
        {"sessions": 0},
        {"max_seconds": 0.0},
        {"half_width": float("nan")},
        {"min_pairs": 50, "max_pairs": 40},
    ],
)
def test_settings_that_cannot_be_measured_with_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        TimingSettings(**wrong)


def test_deadline_leaves_room_for_the_session_itself():
    settings = TimingSettings(max_seconds=100, warmup_seconds=10)
    assert settings.deadline_s(2) > 110


def test_sessions_that_disagree_leave_the_ratio_uncertain_and_more_of_them_make_it_certain():
    rng = np.random.default_rng(0)
    assert not uncertain([session(rng) for _ in range(5)], SETTINGS)
    apart = [session(rng, candidate_ms=2.0 * f) for f in (0.93, 0.95, 1.0, 1.05, 1.07)]
    assert uncertain(apart, SETTINGS)
    assert not uncertain([*apart, *(session(rng) for _ in range(15))], SETTINGS)
