"""One session on a board: models in processes of their own there, warm-up, rounds until the interval is narrow enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..connection import AgentSession, RemoteModel
from ..worker_process import session_of
from .stats import half_width, paired_ratios
from .timing import Session, TimingSettings


def measured(agent: AgentSession, models: Sequence[RemoteModel], settings: TimingSettings, seed: int) -> Session:
    """The samples of loaded models; the first is the baseline. Their inputs are in place.

    Raises:
        DeviceError: see `AgentSession.ask`.
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
    return session_of(
        {
            "models": [{"wall_ns": w, "cpu_ns": c, "k": k} for w, c, k in zip(rounds.wall, rounds.cpu, warmed["k"], strict=True)],
            "stop": rounds.stop,
            "warmup_s": warmed["seconds"],
            "temperatures_c": rounds.temperatures_c,
            "frequencies_mhz": rounds.frequencies_mhz,
            "peak_rss_bytes": rounds.peak_rss_bytes,
            "machine": board["machine"]
            | {"runtime_version": models[0].version, "power_mode": board["power_mode"], "boot_id": board["boot_id"]},
        }
    )


class _Rounds:
    """The samples of a session so far, and when it ends: as worker.py decides it."""

    def __init__(self, models: int, settings: TimingSettings) -> None:
        self.settings = settings
        self.wall: list[list[float]] = [[] for _ in range(models)]
        self.cpu: list[list[float]] = [[] for _ in range(models)]
        self.temperatures_c: list[list[float]] = []
        self.frequencies_mhz: list[list[float]] = []
        self.peak_rss_bytes = 0  # of all the models' processes together
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
        for kept, more in ((self.wall, answer["wall_ns"]), (self.cpu, answer["cpu_ns"])):
            for own, new in zip(kept, more, strict=True):
                own.extend(new)
        self.temperatures_c += answer["temperatures_c"]
        self.frequencies_mhz += answer["frequencies_mhz"]
        self.peak_rss_bytes = max(self.peak_rss_bytes, sum(answer["peak_rss_bytes"]))
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
        base = np.array(self.wall[0])
        arrays = [paired_ratios(base, np.array(w)) for w in self.wall[1:]] or [base]
        return max(half_width(a, block=self.settings.block) for a in arrays)
