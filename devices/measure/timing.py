"""The latency protocol: its settings, the raw samples of its sessions, and how they become a `Timing`.

Nothing here knows what a model is or how a device is reached: samples in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import InputError
from ...pipeline.options import MOST_THREADS
from ...pipeline.types import Kind, Percentiles, Speedup, Timing
from . import stats
from .stats import FloatArray

NOISY_WALL_OVER_CPU = 1.15
NOISY_SESSION_SPREAD = 0.10
WIDE = 0.02  # half the width of a ratio's interval at which more sessions are taken, as a share of it
DRIFT = 0.05
NOISY_RATIO = 0.05  # half the width of a quick ratio's interval; on a quiet machine it is under 0.015
_MOST_RATIO = 1e6
_KEPT_SAMPLES = 500
_ENOUGH = 5  # undisturbed rounds for a median


@dataclass(frozen=True)
class TimingSettings:
    """Settings of a latency measurement.

    Raises:
        InputError: a value that cannot be measured with.
    """

    threads: int = 1  # of the runtime, inside one operator
    affinity: tuple[int, ...] | None = None  # cpus the process may run on
    runtime: str = "onnxruntime"  # see agent.runtimes.RUNTIMES
    sessions: int = 10  # fresh processes; with five, repeated measurements spread more than their intervals say
    most_sessions: int | None = None  # so many while the ratio's interval is wide (`WIDE`); None: as many as `sessions`
    min_pairs: int = 30  # of each session
    max_pairs: int = 500
    max_seconds: float = 20.0  # of each session, warm-up not counted
    half_width: float = 0.02  # a session ends when its interval is narrower than this share of the ratio
    min_sample_ms: float = 1.0  # a sample runs as many inferences as that takes
    warmup_seconds: float = 3.0  # at most
    warmup_window: int = 5  # samples; warm when two consecutive windows agree
    block: int = 10  # pairs kept together by the bootstrap
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("threads", "sessions", "min_pairs", "max_pairs", "warmup_window", "block", "resamples")
        spans = ("max_seconds", "half_width", "min_sample_ms")
        for name in (*counts, *spans, "warmup_seconds"):
            value = getattr(self, name)
            low = 1 if name in counts else 0
            if not math.isfinite(value) or value < low or (name in spans and value == 0):
                bound = "at least 1" if name in counts else "a positive number"
                raise InputError(f"latency setting {name}", found=str(value), expected=bound)
        if self.threads > MOST_THREADS:
            raise InputError("latency setting threads", found=str(self.threads), expected=f"at most {MOST_THREADS}")
        if self.min_pairs > self.max_pairs:
            raise InputError("latency setting min_pairs", found=str(self.min_pairs), expected=f"at most {self.max_pairs}")

    @property
    def session_limit(self) -> int:
        """Most sessions that may be taken."""
        return self.most_sessions or self.sessions

    def deadline_s(self, models: int) -> float:
        """Seconds after which a session is given up: its own limits twice, and a minute to start and to load."""
        return 60.0 + 2 * (self.max_seconds + self.warmup_seconds) + 20.0 * models


@dataclass(frozen=True)
class Ratio:
    """Latency of a candidate as a share of the baseline's, measured quickly; < 1 is faster.

    Raises:
        ValueError: no measurement gives such a value.
    """

    value: float
    half_width: float = 0.0  # of its 95 % interval, as a share of it

    def __post_init__(self) -> None:
        if not (1 / _MOST_RATIO <= self.value <= _MOST_RATIO and 0 <= self.half_width <= _MOST_RATIO):  # NaN is not either
            raise ValueError(f"latency ratio {self.value} +- {self.half_width}")

    @property
    def is_noisy(self) -> bool:
        """Whether it is too uncertain to be kept for later runs."""
        return self.half_width > NOISY_RATIO


@dataclass(frozen=True, eq=False)
class Samples:
    """Times of one model in one session, nanoseconds for one inference."""

    wall_ns: FloatArray  # (rounds,)
    cpu_ns: FloatArray  # (rounds,) of the whole process, all threads
    k: int  # inferences in one sample

    def calm(self) -> NDArray[np.bool_]:
        """Which samples no other process interrupted, (rounds,); none where there is no CPU clock."""
        return self.wall_ns <= NOISY_WALL_OVER_CPU * self.cpu_ns

    def quiet_ms(self) -> float:
        """Median milliseconds of the samples that were not interrupted; of all, where there are fewer than five such."""
        calm = self.calm()
        return float(np.median(self.wall_ns[calm] if calm.sum() >= _ENOUGH else self.wall_ns)) / 1e6


@dataclass(frozen=True, eq=False)
class TimingSession:
    """Samples of one fresh process. Sample i of every model comes from the same round."""

    baseline: Samples
    candidates: tuple[Samples, ...]
    stop: str  # why it ended: "converged", "pairs", "time"
    warmup_s: float
    temperatures_c: tuple[tuple[float, ...], ...]  # one reading a second, every sensor there is
    frequencies_mhz: tuple[tuple[float, ...], ...]
    peak_rss_bytes: int  # of the process, all its models loaded
    machine: dict[str, str]  # cpu, governor, runtime version, load

    def ratios(self, candidate: int = 0) -> FloatArray:
        """Baseline / candidate, round by round."""
        return stats.paired_ratios(self.baseline.wall_ns, self.candidates[candidate].wall_ns)

    def undisturbed(self, candidate: int = 0) -> FloatArray:
        """The ratios of the rounds in which no other process took the core.

        Where there are fewer than five such, the ratios of CPU time, which other processes hardly touch. For quick
        decisions on a busy machine; a reported figure is wall time of every round.
        """
        base, other = self.baseline, self.candidates[candidate]
        calm = base.calm() & other.calm()
        if calm.sum() >= _ENOUGH:
            return self.ratios(candidate)[calm]
        cpu = _cpu_ratios(base, other)
        return cpu if len(cpu) >= _ENOUGH else self.ratios(candidate)

    def quick_ratio(self) -> Ratio:
        """Candidate / baseline, from the undisturbed rounds."""
        found = self.undisturbed()
        return Ratio(1.0 / float(np.median(found)), stats.half_width(found))


def build_timing(
    device: str,
    sessions: Sequence[TimingSession],
    control: TimingSession,
    settings: TimingSettings,
    *,
    kind: Kind = Kind.MEASURED,
) -> Timing:
    """The figures of some sessions of a baseline and one candidate; `control` is the baseline against a copy of itself."""
    ratios = [s.ratios() for s in sessions]
    speedup = speedup_between(sessions, None, 0, settings)
    low, high = speedup.ci95
    dense = np.concatenate([s.baseline.wall_ns for s in sessions]) / 1e6
    artifact = np.concatenate([s.candidates[0].wall_ns for s in sessions]) / 1e6
    kept = np.unique(np.linspace(0, len(dense) - 1, _KEPT_SAMPLES).astype(int))
    spread = stats.session_spread(ratios[: settings.sessions])  # a range, which grows with their number
    drift = max((_drift(s.baseline) for s in sessions), key=abs)
    wall_over_cpu = max(_wall_over_cpu([s.baseline for s in sessions]), _wall_over_cpu([s.candidates[0] for s in sessions]))
    cpu = np.concatenate([_cpu_ratios(s.baseline, s.candidates[0]) for s in sessions])
    quality = []
    if wall_over_cpu > NOISY_WALL_OVER_CPU or spread > NOISY_SESSION_SPREAD:
        quality.append("noisy")
    if abs(drift) > DRIFT:
        quality.append("drift")
    if low <= 1.0 <= high:
        quality.append("inconclusive")
    return Timing(
        device=device,
        kind=kind,
        dense=Percentiles(*stats.percentiles(dense)),
        artifact=Percentiles(*stats.percentiles(artifact)),
        speedup=speedup,
        noise_floor=abs(float(np.median(control.ratios())) - 1.0),  # no smaller difference can be told
        sessions=len(sessions),
        pairs=len(dense),
        threads=settings.threads,
        quality=tuple(quality),
        environment=_environment(sessions, settings)
        | ({"speedup_cpu_time": f"{np.median(cpu):.4f}"} if len(cpu) else {})
        | {"wall_over_cpu": f"{wall_over_cpu:.3f}", "session_spread": f"{spread:.4f}", "baseline_drift": f"{drift:+.4f}"},
        dense_samples_ms=tuple(round(float(v), 6) for v in dense[kept]),
        artifact_samples_ms=tuple(round(float(v), 6) for v in artifact[kept]),
    )


def uncertain(sessions: Sequence[TimingSession], settings: TimingSettings) -> bool:
    """Whether the interval of some candidate's speedup is wider than `WIDE` to either side."""
    found = [speedup_between(sessions, None, i, settings) for i in range(len(sessions[0].candidates))]
    return any((s.ci95[1] - s.ci95[0]) / 2 > WIDE * s.median for s in found)


def speedup_between(sessions: Sequence[TimingSession], slow: int | None, fast: int, settings: TimingSettings) -> Speedup:
    """Speedup of a candidate over another one of the same sessions, or over the baseline (`slow` is None)."""

    def wall(session: TimingSession) -> FloatArray:
        return (session.baseline if slow is None else session.candidates[slow]).wall_ns

    ratios = [stats.paired_ratios(wall(s), s.candidates[fast].wall_ns) for s in sessions]
    median, low, high = stats.two_level_bootstrap(ratios, block=settings.block, resamples=settings.resamples, seed=settings.seed)
    return Speedup(median, (low, high))


def _cpu_ratios(base: Samples, other: Samples) -> FloatArray:
    """Ratios of CPU time, a check on those of wall time; empty where there is no CPU clock."""
    seen = (base.cpu_ns > 0) & (other.cpu_ns > 0)
    return stats.paired_ratios(base.cpu_ns[seen], other.cpu_ns[seen])


def _drift(baseline: Samples) -> float:
    """Of the CPU time where there is one: a hot or throttled core slows it down, other people's load does not."""
    return stats.drift(baseline.cpu_ns if np.median(baseline.cpu_ns) > 0 else baseline.wall_ns)


def _wall_over_cpu(samples: Sequence[Samples]) -> float:
    """Median of wall / CPU time; 1 on a core of one's own, less with several threads, 1 where there is no CPU clock."""
    wall = np.concatenate([s.wall_ns for s in samples])
    cpu = np.concatenate([s.cpu_ns for s in samples])
    return float(np.median(wall[cpu > 0] / cpu[cpu > 0])) if (cpu > 0).any() else 1.0


def _environment(sessions: Sequence[TimingSession], settings: TimingSettings) -> dict[str, str]:
    first = sessions[0]
    found = dict(first.machine)
    degrees = [t for s in sessions for reading in s.temperatures_c for t in reading]
    clocks = [f for s in sessions for reading in s.frequencies_mhz for f in reading]
    if degrees:
        found["temperature_max_c"] = f"{max(degrees):.1f}"
    if clocks:
        found["frequency_mhz"] = f"{min(clocks):.0f}-{max(clocks):.0f}"
    return found | {
        "runtime": settings.runtime,
        "threads": str(settings.threads),
        "affinity": ",".join(map(str, settings.affinity)) if settings.affinity else "any",
        "sessions": str(len(sessions)),
        "pairs_per_session": ",".join(str(len(s.baseline.wall_ns)) for s in sessions),
        "stop": ",".join(s.stop for s in sessions),
        "inferences_per_sample": f"{first.baseline.k}/{first.candidates[0].k}",
        "min_pairs": str(settings.min_pairs),
        "max_pairs": str(settings.max_pairs),
        "max_seconds": f"{settings.max_seconds:g}",
        "half_width": f"{settings.half_width:g}",
        "min_sample_ms": f"{settings.min_sample_ms:g}",
        "warmup_s": ",".join(f"{s.warmup_s:.2f}" for s in sessions),
        "bootstrap": f"two-level, block {settings.block}, {settings.resamples} resamples, seed {settings.seed}",
        "peak_rss_bytes": str(max(s.peak_rss_bytes for s in sessions)),
    }
