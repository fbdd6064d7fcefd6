"""One timing session: loaded models are warmed up on the board, then sampled in rounds until the interval is narrow enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..transport.connection import Connection, LoadedModel
from .stats import half_width, paired_ratios
from .timing import Samples, TimingSession, TimingSettings


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
    rounds = _Rounds(len(models), settings)
    while rounds.stop is None:
        request = {"op": "pairs", "handles": handles, "k": warmed["k"], "seed": seed + rounds.done, **rounds.next()}
        rounds.add(agent.ask(request, deadline_s, what)[0])
    board = agent.hello()
    machine = board["machine"] | {
        "runtime_version": models[0].version,
        "power_mode": board["power_mode"],
        "boot_id": board["boot_id"],
    }
    samples = [Samples(np.array(w), np.array(c), int(k)) for w, c, k in zip(rounds.wall, rounds.cpu, warmed["k"], strict=True)]
    return TimingSession(
        baseline=samples[0],
        candidates=tuple(samples[1:]),
        stop=rounds.stop,
        warmup_s=float(warmed["seconds"]),
        temperatures_c=tuple(tuple(map(float, reading)) for reading in rounds.temperatures_c),
        frequencies_mhz=tuple(tuple(map(float, reading)) for reading in rounds.frequencies_mhz),
        peak_rss_bytes=rounds.peak_rss_bytes,
        machine={str(key): str(value) for key, value in machine.items() if value},
    )


class _Rounds:
    """The samples of a session so far, and when it ends."""

    def __init__(self, models: int, settings: TimingSettings) -> None:
        self.settings = settings
        self.wall: list[list[float]] = [[] for _ in range(models)]
        self.cpu: list[list[float]] = [[] for _ in range(models)]
        self.temperatures_c: list[list[float]] = []
        self.frequencies_mhz: list[list[float]] = []
        self.peak_rss_bytes = 0  # of the process, all its models loaded
        self.seconds = 0.0  # on the board
        self.stop: str | None = None
        self._check = settings.min_pairs

    @property
    def done(self) -> int:
        return len(self.wall[0])

    def next(self) -> dict[str, float]:
        """How much to ask for."""
        rounds = min(self._check, self.settings.max_pairs) - self.done
        return {"rounds": rounds, "seconds": max(0.0, self.settings.max_seconds - self.seconds)}

    def add(self, answer: dict[str, Any]) -> None:
        """Take in what the board sampled, and set `stop` when it is enough."""
        for kept, more in ((self.wall, answer["wall_ns"]), (self.cpu, answer["cpu_ns"])):
            for own, new in zip(kept, more, strict=True):
                own.extend(new)
        self.temperatures_c += answer["temperatures_c"]
        self.frequencies_mhz += answer["frequencies_mhz"]
        self.peak_rss_bytes = max(self.peak_rss_bytes, int(answer["peak_rss_bytes"]))
        self.seconds += answer["seconds"]
        if self.done >= self.settings.max_pairs:
            self.stop = "pairs"
        elif self.seconds > self.settings.max_seconds:
            self.stop = "time"
        elif self.done >= self._check:
            self._check = self.done + max(5, self.done // 4)
            if self._widest() < self.settings.half_width:
                self.stop = "converged"

    def _widest(self) -> float:
        """The widest half-width among the candidates' ratios; of the baseline's own times when it is alone."""
        base = np.array(self.wall[0])
        arrays = [paired_ratios(base, np.array(w)) for w in self.wall[1:]] or [base]
        return max(half_width(a, block=self.settings.block) for a in arrays)
