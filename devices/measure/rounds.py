"""One timing session: loaded models are warmed up on the board, then sampled in rounds until the interval is narrow enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...pipeline.errors import DeviceError
from ..transport.connection import Connection, LoadedModel
from .stats import half_width, paired_ratios
from .timing import Samples, TimingSession, TimingSettings

_LEAST_S = 1e-6  # of one inference; the call alone takes longer


def measured(agent: Connection, models: Sequence[LoadedModel], settings: TimingSettings, seed: int) -> TimingSession:
    """The samples of loaded models; the first is the baseline. Their inputs are in place.

    Raises:
        DeviceError: see `Connection.ask`.
    """
    what = "measuring " + " and ".join(dict.fromkeys(model.name for model in models))
    handles = [model.handle for model in models]
    deadline_s = settings.deadline_s(len(models))
    warm = {"op": "warm", "handles": handles, "floor_ns": settings.min_sample_ms * 1e6, "window": settings.warmup_window}
    warmed, _ = agent.ask({**warm, "seconds": settings.warmup_seconds}, deadline_s, what)
    _require(agent, what, "seconds", warmed["seconds"], most=deadline_s)
    _require(agent, what, "k", warmed["k"], above=True, most=max(1.0, settings.max_seconds / _LEAST_S))  # a sample has to end
    if len(warmed["k"]) != len(models):
        raise DeviceError(f"{agent.name}: {what}: k", found=f"{len(warmed['k'])} numbers", expected=f"{len(models)}")
    wall: list[list[float]] = [[] for _ in models]
    cpu: list[list[float]] = [[] for _ in models]
    temperatures_c: list[list[float]] = []
    frequencies_mhz: list[list[float]] = []
    done, check, seconds, peak_rss_bytes, stop = 0, settings.min_pairs, 0.0, 0, ""  # seconds: on the board
    while not stop:
        much = {"rounds": min(check, settings.max_pairs) - done, "seconds": max(0.0, settings.max_seconds - seconds)}
        request = {"op": "pairs", "handles": handles, "k": warmed["k"], "seed": seed + done, **much}
        answer, _ = agent.ask(request, deadline_s, what)
        _require(agent, what, "wall_ns", answer["wall_ns"], above=True)
        _require(agent, what, "cpu_ns", answer["cpu_ns"])
        _require(agent, what, "seconds", answer["seconds"], most=deadline_s)
        rows = {len(row) for row in (*answer["wall_ns"], *answer["cpu_ns"])}
        if len(answer["wall_ns"]) != len(models) or len(answer["cpu_ns"]) != len(models) or len(rows) != 1 or rows == {0}:
            expected = "as many of each model, at least 1"
            raise DeviceError(f"{agent.name}: {what}", found=f"{sorted(rows)} times", expected=expected)
        for kept, more in ((wall, answer["wall_ns"]), (cpu, answer["cpu_ns"])):
            for own, new in zip(kept, more, strict=True):
                own.extend(new)
        temperatures_c += answer["temperatures_c"]
        frequencies_mhz += answer["frequencies_mhz"]
        peak_rss_bytes = max(peak_rss_bytes, int(answer["peak_rss_bytes"]))
        seconds += answer["seconds"]
        done = len(wall[0])
        if done >= settings.max_pairs:
            stop = "pairs"
        elif seconds > settings.max_seconds:
            stop = "time"
        elif done >= check:
            check = done + max(5, done // 4)
            stop = "converged" if _widest(wall, settings.block) < settings.half_width else ""
    board = agent.hello()
    state = {"runtime_version": models[0].version, "power_mode": board["power_mode"], "boot_id": board["boot_id"]}
    baseline, *candidates = (Samples(np.array(w), np.array(c), int(k)) for w, c, k in zip(wall, cpu, warmed["k"], strict=True))
    return TimingSession(
        baseline=baseline,
        candidates=tuple(candidates),
        stop=stop,
        warmup_s=float(warmed["seconds"]),
        temperatures_c=tuple(tuple(map(float, reading)) for reading in temperatures_c),
        frequencies_mhz=tuple(tuple(map(float, reading)) for reading in frequencies_mhz),
        peak_rss_bytes=peak_rss_bytes,
        machine={str(key): str(value) for key, value in (board["machine"] | state).items() if value},
    )


def _require(agent: Connection, what: str, name: str, values: Any, *, above: bool = False, most: float = float("inf")) -> None:
    """Validates numbers that a board reports: finite, at least 0, or above 0, and not over `most`.

    Raises:
        DeviceError: one is not.
    """
    each = values if isinstance(values, list) else [values]
    try:
        found = np.concatenate([np.atleast_1d(np.asarray(part, np.float64)) for part in each])
    except (ValueError, TypeError):
        found = np.array([np.nan])
    bad = found[~(np.isfinite(found) & ((found > 0) if above else (found >= 0)) & (found <= most))]
    if len(bad):
        expected = f"numbers {'above' if above else 'of at least'} 0" + (f" and at most {most:g}" if most < np.inf else "")
        raise DeviceError(f"{agent.name}: {what}: {name}", found=str(bad[0]), expected=expected)


def _widest(wall: Sequence[Sequence[float]], block: int) -> float:
    """The widest half-width among the candidates' ratios; of the baseline's own times when it is alone."""
    base, *others = map(np.array, wall)
    return max(half_width(values, block=block) for values in [paired_ratios(base, own) for own in others] or [base])
