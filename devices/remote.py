"""A board behind a transport, as a device; this machine is one of them, see local.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..pipeline.errors import UnavailableError
from ..pipeline.types import Kind, Timing
from .board import Board
from .device import Meter, Progress, Take, measure_with
from .leases import lease
from .measure.meter import QuickMeter
from .measure.rounds import measured
from .measure.timing import TimingSession, TimingSettings
from .transport.base import BoardError, Transport
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

        What an emulated board gives is of kind `emulated`.

        Raises:
            InputError, DeviceError, BuildError, UnavailableError: see `Connection.ask`; also a `DeviceError` when the
                power mode is not the board file's, or when it changed or the board was rebooted while it was measured.
        """
        with self._taking() as (take, kind):
            return measure_with(take, self.name, baseline, candidate, settings, progress, kind)

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[TimingSession, ...]:
        """See `device.Device.sessions`.

        Raises:
            UnavailableError: the board is emulated, so that nobody takes its times for measured ones.
        """
        with self._taking() as (take, kind):
            self._require_real(kind)
            return take(baseline, candidates, settings, progress)

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """See `device.Device.facts`.

        Raises:
            UnavailableError: the runtime is not there, or the board is emulated: a table of its times would mean nothing.
        """
        with self.connect() as agent:
            board = agent.hello()
            self._require_real(agent.kind())
            self._require_power_mode(str(board["power_mode"]))
            package, version = agent.runtime(runtime)
        machine = {k: str(v) for k, v in board["machine"].items() if k in ("cpu", "board", "governor")}
        return machine | {
            "host": str(board["host"]),
            "address": f"{self.board.transport} {self.board.address}".strip(),
            "runtime_version": f"{package} {version}",
            "power_mode": str(board["power_mode"]),
        }

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> Meter:
        """See `device.Device.meter`."""
        settings = TimingSettings(threads=threads, affinity=self.board.affinity, runtime=runtime, seed=seed)
        return QuickMeter(self.connect, baseline, settings)

    @contextlib.contextmanager
    def _taking(self) -> Iterator[tuple[Take, Kind]]:
        with self.connect() as agent:
            before = agent.hello()
            self._require_power_mode(str(before["power_mode"]))

            def take(
                baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None
            ) -> tuple[TimingSession, ...]:
                settings = replace(settings, affinity=settings.affinity or self.board.affinity)
                models = (baseline, *candidates)
                return self._repeated(
                    before, settings, progress, lambda number: _take_one(agent, models, settings, settings.seed + number)
                )

            yield take, agent.kind()

    def _repeated(
        self,
        before: dict[str, Any],
        settings: TimingSettings,
        progress: Progress | None,
        take_one: Callable[[int], TimingSession],
    ) -> tuple[TimingSession, ...]:
        """The sessions that `take_one` gives by number, of a board that stays what it was `before`."""
        done = []
        for number in range(settings.sessions):
            done.append(take_one(number))
            self._require_same(before, done[-1].machine)
            if progress is not None:
                progress(number + 1, settings.sessions)
        return tuple(done)

    def _require_real(self, kind: Kind) -> None:
        if kind is not Kind.MEASURED:
            raise UnavailableError(f"board {self.name}", found="an emulated board", expected="a real one for its times")

    def _require_power_mode(self, found: str) -> None:
        if self.board.power_mode and found != self.board.power_mode:
            raise BoardError(
                f"board {self.name}: power mode",
                found=found or "none that can be read",
                expected=self.board.power_mode,
                do="set it with nvpmodel, or take `power_mode` out of the board's file",
            )

    def _require_same(self, before: dict[str, Any], after: dict[str, str]) -> None:
        """The board was not rebooted, nor its power mode changed, since `before`: samples of two states are not mixed."""
        for key, what, expected in (
            ("boot_id", "it was rebooted while it was measured: boot", "one boot"),
            ("power_mode", "power mode", "one mode while it is measured"),
        ):
            if after.get(key, "") != before[key]:
                raise BoardError(
                    f"board {self.name}: {what}",
                    found=f"{before[key]}, then {after.get(key, 'none')}",
                    expected=expected,
                    do="run the same command again",
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


def _nothing() -> None:
    """What ends with a connection inside `leased`."""
