"""Quick ratios on a board: the baseline stays loaded there, candidates come and go."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from ...pipeline.errors import DeviceError
from ..connection import IDLE_S, AgentSession, RemoteModel
from ..device import QUICK_FEWEST, QUICK_HALF_WIDTH, QUICK_PAIRS
from ..transport.base import BoardError
from .rounds import measured
from .timing import Session, TimingSettings


class RemoteMeter:
    """See `device.Meter`. Nothing is connected until the first ratio.

    Args:
        connect: gives an agent on the board.
        baseline: the model's file.
        settings: runtime, threads, affinity and seed; the rest is the quick measurement's own.
    """

    width = 1

    def __init__(self, connect: Callable[[], AgentSession], baseline: bytes, settings: TimingSettings) -> None:
        self._connect, self._baseline = connect, baseline
        self._settings = replace(settings, warmup_seconds=0.1, warmup_window=2, max_seconds=30.0)
        self._agent: AgentSession | None = None
        self._loaded: RemoteModel | None = None  # the baseline
        self._boot = ""
        self._used = 0.0  # when the agent was last asked, by time.monotonic
        self._dense_ms: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the agent; safe to call twice."""
        agent, self._agent, self._loaded = self._agent, None, None
        if agent is not None:
            agent.close()

    @property
    def dense_ms(self) -> float:
        """See `device.Meter.dense_ms`."""
        if self._dense_ms is None:
            self._dense_ms = self._measure(None, 40, 40).baseline.quiet_ms()
        return self._dense_ms

    def ratio(self, candidate: bytes) -> float:
        """See `device.Meter.ratio`."""
        return 1.0 / float(np.median(self._measure(candidate, QUICK_PAIRS, QUICK_FEWEST).undisturbed()))

    def ratios(self, candidates: Sequence[bytes]) -> list[float]:
        """One after another: there is one board."""
        return [self.ratio(candidate) for candidate in candidates]

    def _measure(self, candidate: bytes | None, pairs: int, fewest: int) -> Session:
        settings = replace(self._settings, min_pairs=fewest, max_pairs=pairs, half_width=QUICK_HALF_WIDTH)
        try:
            agent, baseline = self._ready()
            if candidate is None:
                session = measured(agent, [baseline], settings, settings.seed)
                self._used = time.monotonic()
                return session
            digest, sent = agent.put_bytes(candidate, "a candidate of the search")
            try:
                model = self._load(agent, digest, "a candidate of the search")
                session = measured(agent, [baseline, model], settings, settings.seed)
                model.unload(spare=True)
            finally:
                if sent:  # hundreds of them would fill a small board
                    with contextlib.suppress(DeviceError):
                        agent.drop(digest)
            self._used = time.monotonic()
            return session
        except BaseException:  # the next ratio starts afresh
            self.close()
            raise

    def _ready(self) -> tuple[AgentSession, RemoteModel]:
        if time.monotonic() - self._used > IDLE_S / 2:  # it ends itself when a candidate's accuracy takes long
            self.close()
        if self._agent is None or self._loaded is None:
            self._agent = self._connect()
            boot = str(self._agent.hello()["boot_id"])
            if self._boot not in ("", boot):
                raise BoardError(
                    f"board {self._agent.name}: it was rebooted during the search: boot",
                    found=f"{self._boot}, then {boot}",
                    expected="one boot",
                    do="run the same command again",
                )
            self._boot = boot
            digest, _ = self._agent.put_bytes(self._baseline, "the dense model")
            self._loaded = self._load(self._agent, digest, "the dense model")
        return self._agent, self._loaded

    def _load(self, agent: AgentSession, digest: str, name: str) -> RemoteModel:
        settings = self._settings
        model = agent.load_digest(digest, name, settings.runtime, settings.threads, settings.affinity)
        model.feed_random(settings.seed)
        return model
