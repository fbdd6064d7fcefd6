"""Quick ratios for a search: the baseline stays loaded on the board, candidates come and go beside it in one process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

from ...pipeline.errors import BuildError, DeviceError
from ..transport.connection import IDLE_S, Connection, LoadedModel
from .rounds import measured
from .timing import Ratio, TimingSession, TimingSettings

QUICK_HALF_WIDTH = 0.015  # of a ratio; the noise between two measurements of one candidate is larger
QUICK_FEWEST, QUICK_PAIRS = 12, 24  # rounds for a candidate of a search: at least, and at most unless they are short
QUICK_SECONDS = 0.15  # as many rounds as this allows where that is more: one in three small candidates needs them
_DENSE_ROUNDS = 40
_CANDIDATE = "a candidate of the search"


class Meter(Protocol):
    """Latency ratios of many candidates against one baseline: a search's inner loop.

    Cheap, and slightly biased by the state of the one process they come from; what is reported is measured again by
    `Device.measure`.
    """

    width: int = 1  # how many candidates are measured at once: one on each board

    @property
    def dense_ms(self) -> float:
        """Median latency of the baseline in milliseconds, measured once."""

    def ratio(self, candidate: bytes) -> Ratio:
        """Latency of a candidate (the model's file) as a share of the baseline's; < 1 is faster.

        Raises:
            DeviceError: the candidate killed its process, took too long, or the board failed.
            BuildError: the runtime refused the candidate.
        """

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """The same for several, in order; on several boards at once where there are more than one."""
        return [self.ratio(candidate) for candidate in candidates]

    def close(self) -> None:
        """Leave nothing running; safe to call twice."""
        return


class QuickMeter(Meter):
    """See `Meter`. Nothing is connected until the first ratio.

    Of the settings it uses runtime, threads, affinity and seed; the rest is the quick measurement's own.
    """

    def __init__(self, connect: Callable[[], Connection], baseline: bytes, settings: TimingSettings) -> None:
        self._connect, self._baseline = connect, baseline
        self._settings = replace(settings, warmup_seconds=0.1, warmup_window=2, max_seconds=30.0)
        self._agent: Connection | None = None
        self._loaded: LoadedModel | None = None  # the baseline
        self._boot = ""
        self._used = 0.0  # when the agent was last asked, by time.monotonic

    def close(self) -> None:
        """End the agent; safe to call twice."""
        agent, self._agent, self._loaded = self._agent, None, None
        if agent is not None:
            agent.close()

    @cached_property
    def dense_ms(self) -> float:
        """See `Meter.dense_ms`."""
        return self._measure(None, _DENSE_ROUNDS, _DENSE_ROUNDS).baseline.quiet_ms()

    def ratio(self, candidate: bytes) -> Ratio:
        """See `Meter.ratio`."""
        pair_ms = 2 * max(self.dense_ms, self._settings.min_sample_ms)  # the candidate is hardly slower
        return self._measure(candidate, max(int(QUICK_SECONDS * 1e3 / pair_ms), QUICK_PAIRS), QUICK_FEWEST).quick_ratio()

    def _measure(self, candidate: bytes | None, pairs: int, fewest: int) -> TimingSession:
        settings = replace(self._settings, min_pairs=fewest, max_pairs=pairs, half_width=QUICK_HALF_WIDTH)
        try:
            agent, baseline = self._ready()
            with self._candidate(agent, candidate) as others:
                session = measured(agent, [baseline, *others], settings, settings.seed)
        except BuildError:  # the candidate's fault: agent and baseline are as they were
            raise
        except BaseException:  # the next ratio starts afresh
            self.close()
            raise
        self._used = time.monotonic()
        return session

    @contextlib.contextmanager
    def _candidate(self, agent: Connection, data: bytes | None) -> Iterator[list[LoadedModel]]:
        """The candidate loaded beside the baseline, and gone afterwards."""
        if data is None:
            yield []
            return
        digest, sent = agent.put_bytes(data, _CANDIDATE)
        try:
            model = self._load(agent, digest, _CANDIDATE, self._loaded)
            yield [model]
            model.unload()
        finally:
            if sent:  # hundreds of them would fill a small board
                with contextlib.suppress(DeviceError):
                    agent.drop(digest)

    def _ready(self) -> tuple[Connection, LoadedModel]:
        if time.monotonic() - self._used > IDLE_S / 2:  # it ends itself when a candidate's accuracy takes long
            self.close()
        if self._agent is None or self._loaded is None:
            self._agent = self._connect()
            boot = str(self._agent.hello()["boot_id"])
            if self._boot not in ("", boot):
                what, found = "it was rebooted during the search: boot", f"{self._boot}, then {boot}"
                raise self._agent.transport.error(what, found, "one boot", "run the same command again")
            self._boot = boot
            digest, _ = self._agent.put_bytes(self._baseline, "the dense model")
            self._loaded = self._load(self._agent, digest, "the dense model", None)
        return self._agent, self._loaded

    def _load(self, agent: Connection, digest: str, name: str, beside: LoadedModel | None) -> LoadedModel:
        settings = self._settings
        model = agent.load((digest, name), settings.runtime, settings.threads, settings.affinity, beside)
        try:
            model.feed_random(settings.seed)
        except BuildError:
            model.unload()
            raise
        return model
