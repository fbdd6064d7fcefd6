"""A board behind a transport, as a device; this machine is one of them, see local.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.errors import UnavailableError
from ..pipeline.types import Kind, Timing
from .board import Board
from .device import Progress
from .leases import lease
from .measure.meter import Meter, QuickMeter
from .measure.rounds import measured
from .measure.stats import FloatArray
from .measure.timing import Samples, TimingSession, TimingSettings, build_timing, uncertain
from .transport.base import Transport
from .transport.connection import Connection, LoadedModel


class RemoteDevice:
    """A board over ssh or adb; see `device.Device`. While an agent works on it, no other process of this machine gets it."""

    def __init__(self, board: Board, transport: Transport) -> None:
        self.name, self.board, self.transport = board.name, board, transport
        self._holder: int | None = None  # the thread that is inside `leased`

    def close(self) -> None:
        """Leave nothing running here; safe to call twice."""
        self.transport.close()

    @contextlib.contextmanager
    def leased(self) -> Iterator[None]:
        """The board is this process's meanwhile, between two agents too.

        Raises:
            BusyError: another process of this machine has it.
        """
        held = lease(self.board)
        self._holder = threading.get_ident()
        try:
            yield
        finally:
            self._holder = None
            held.release()

    def connect(self) -> Connection:
        """An agent on the board, which is this process's until it is closed; see `Connection`.

        Raises:
            DeviceError: another process of this machine, or another thread of this one, has the board; else see `Connection`.
        """
        release: Callable[[], None] = _nothing if self._holder == threading.get_ident() else lease(self.board).release
        try:
            return self._connected(release)
        except BaseException:
            release()
            raise

    def _connected(self, at_end: Callable[[], None]) -> Connection:
        return Connection(self.transport, self.name, self.board.python, at_end, self.board.emulated)

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """See `device.Device.measure`. Every session loads its models into a fresh process on the board.

        Times of an emulated board are of kind `emulated`.

        Raises:
            InputError, DeviceError, BuildError, UnavailableError: see `Connection.ask`; also a `DeviceError` when the
                power mode is not the board file's, or when it changed or the board was rebooted while it was measured.
        """
        told = progress or _nothing
        again = replace(settings, sessions=1, most_sessions=None, seed=settings.seed + settings.session_limit)
        with self.connect() as agent:
            before = self._state(agent)
            sessions = self._taken(agent, before, (baseline, candidate), settings, lambda done, total: told(done, total + 1))
            (control,) = self._taken(agent, before, (baseline, baseline), again, lambda *_: None)
            told(len(sessions) + 1, len(sessions) + 1)
            return build_timing(self.name, sessions, control, settings, kind=agent.kind())

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[TimingSession, ...]:
        """See `device.Device.sessions`.

        Raises:
            UnavailableError: the board is emulated, so its times must not be taken for measured ones.
        """
        told = progress or _nothing
        with self.connect() as agent:
            before = self._state(agent)
            self._require_real(agent)
            return self._taken(agent, before, (baseline, *candidates), settings, told)

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """See `device.Device.facts`.

        Raises:
            UnavailableError: the runtime is not there, or the board is emulated: a table of its times would mean nothing.
        """
        with self.connect() as agent:
            self._require_real(agent)
            board = agent.hello()
            self._require_power_mode(str(board["power_mode"]))
            version = self.runtime_version(agent, runtime)
        machine = {k: str(v) for k, v in board["machine"].items() if k in ("cpu", "board", "governor")}
        if self.board.affinity is not None:  # a fast core and a slow one of one board are two devices
            machine["affinity"] = ",".join(map(str, self.board.affinity))
        return machine | {
            "host": str(board["host"]),
            "address": f"{self.board.transport} {self.board.address}".strip(),
            "runtime_version": version,
            "power_mode": str(board["power_mode"]),
        }

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> Meter:
        """See `device.Device.meter`."""
        settings = TimingSettings(threads=threads, affinity=self.board.affinity, runtime=runtime, seed=seed)
        return QuickMeter(self.connect, baseline, settings)

    def _state(self, agent: Connection) -> dict[str, Any]:
        """The board's description, in the power mode it must be in."""
        found = agent.hello()
        self._require_power_mode(str(found["power_mode"]))
        return found

    def runtime_version(self, agent: Connection, runtime: str) -> str:
        """Package and version of a runtime, which is started there; see `Connection.runtime`."""
        return " ".join(agent.runtime(runtime))

    def _sampler(
        self, agent: Connection, before: dict[str, Any], models: Sequence[Path], settings: TimingSettings
    ) -> Callable[[int], TimingSession]:
        """A function that takes a session by its number; the first model is the baseline, `before` the board's state."""
        return lambda number: _take_one(agent, models, settings, settings.seed + number)

    def _taken(
        self,
        agent: Connection,
        before: dict[str, Any],
        models: Sequence[Path],
        settings: TimingSettings,
        told: Progress,
    ) -> tuple[TimingSession, ...]:
        """The sessions of a board that stays in the state it was in `before`; up to `most_sessions` while the ratio is unsure."""
        settings = replace(settings, affinity=settings.affinity or self.board.affinity)
        take = self._sampler(agent, before, models, settings)
        done: list[TimingSession] = []
        total = settings.sessions
        while len(done) < total:
            done.append(take(len(done)))
            self._require_same(before, done[-1].machine)
            if len(done) == total < settings.session_limit and uncertain(done, settings):
                total += 1
            told(len(done), total)
        return tuple(done)

    def _require_real(self, agent: Connection) -> None:
        if agent.kind() is not Kind.MEASURED:
            raise UnavailableError(f"board {self.name}", found="an emulated board", expected="a real one for its times")

    def _require_power_mode(self, found: str) -> None:
        if self.board.power_mode and found != self.board.power_mode:
            do = "set it with nvpmodel, or take `power_mode` out of the board's file"
            raise self.transport.error("power mode", found or "none that can be read", self.board.power_mode, do)

    def _require_same(self, before: dict[str, Any], after: dict[str, str]) -> None:
        """The board was not rebooted, nor its power mode changed, since `before`: samples of two states are not mixed."""
        for key, what, expected in (
            ("boot_id", "it was rebooted while it was measured: boot", "one boot"),
            ("power_mode", "power mode", "one mode while it is measured"),
        ):
            if after.get(key, "") != before[key]:
                found = f"{before[key]}, then {after.get(key, 'none')}"
                raise self.transport.error(what, found, expected, "run the same command again")


def wall_session(
    times_ns: Iterable[FloatArray], k: int, board: dict[str, Any], warmup_s: float, facts: Mapping[str, str]
) -> TimingSession:
    """A session of wall times alone, one array for each model, the baseline first; `k` inferences were in one sample.

    `board` is the board's description afterwards, `facts` are added to its machine.
    """
    state = {key: str(board[key]) for key in ("power_mode", "boot_id")}
    baseline, *candidates = (Samples(own, np.zeros(len(own)), k) for own in times_ns)
    return TimingSession(
        baseline=baseline,
        candidates=tuple(candidates),
        stop="pairs",
        warmup_s=warmup_s,
        temperatures_c=(tuple(float(v) for v in board["temperatures_c"].values()),),
        frequencies_mhz=(tuple(float(now) for now, _, _ in board["clocks_mhz"].values()),),
        peak_rss_bytes=0,
        machine={str(key): str(value) for key, value in board["machine"].items()} | state | dict(facts),
    )


def _take_one(agent: Connection, models: Sequence[Path], settings: TimingSettings, seed: int) -> TimingSession:
    """One session in a fresh process."""
    loaded: list[LoadedModel] = []
    for path in models:
        beside = loaded[0] if loaded else None
        loaded.append(agent.load(path, settings.runtime, settings.threads, settings.affinity, beside))
        loaded[-1].feed_random(seed)
    session = measured(agent, loaded, settings, seed)
    for model in loaded:
        model.unload()
    return session


def _nothing(*_: object) -> None:
    """Takes no notice: of a session that is done, or of the end of a connection inside `leased`."""
