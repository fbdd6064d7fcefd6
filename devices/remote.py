"""A board behind a transport, as a device: same settings, same rounds, same statistics as on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..pipeline.errors import UnavailableError
from ..pipeline.types import Kind, Timing
from .board import Board
from .connection import AgentSession
from .device import Progress, Take, measure_with
from .leases import lease
from .measure.meter import RemoteMeter
from .measure.rounds import measured
from .measure.timing import Session, TimingSettings
from .transport.base import BoardError, Transport


class RemoteDevice:
    """A board over ssh or adb; see `device.Device`. While an agent works on it, no other process of this machine gets it."""

    def __init__(self, board: Board, transport: Transport) -> None:
        self.name, self.board, self.transport = board.name, board, transport
        self._leased = False

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
        self._leased = True
        try:
            yield
        finally:
            self._leased = False
            held.release()

    def connect(self) -> AgentSession:
        """An agent on the board, which is this process's until it is closed; see `AgentSession`.

        Raises:
            DeviceError: another process of this machine has the board; else see `AgentSession`.
        """
        if self._leased:
            return AgentSession(self.transport, self.name, self.board.python, lambda: None, self.board.emulated)
        held = lease(self.board)
        try:
            return AgentSession(self.transport, self.name, self.board.python, held.release, self.board.emulated)
        except BaseException:
            held.release()
            raise

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """See `device.Device.measure`. Every session loads its models into fresh processes on the board.

        What an emulated board gives is of kind `emulated`.

        Raises:
            InputError, DeviceError, BuildError, UnavailableError: see `AgentSession.ask`; also a `DeviceError` when the
                power mode is not the board file's, or when it changed or the board was rebooted while it was measured.
        """
        with self._taking() as (take, kind):
            return measure_with(take, self.name, baseline, candidate, settings, progress, kind)

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[Session, ...]:
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
            "address": f"{self.board.transport} {self.board.address}",
            "runtime_version": f"{package} {version}",
            "power_mode": str(board["power_mode"]),
        }

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> RemoteMeter:
        """See `device.Device.meter`."""
        settings = TimingSettings(threads=threads, affinity=self.board.affinity, runtime=runtime, seed=seed)
        return RemoteMeter(self.connect, baseline, settings)

    @contextlib.contextmanager
    def _taking(self) -> Iterator[tuple[Take, Kind]]:
        with self.connect() as agent:
            before = agent.hello()
            self._require_power_mode(str(before["power_mode"]))

            def take(
                baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None
            ) -> tuple[Session, ...]:
                settings = replace(settings, affinity=settings.affinity or self.board.affinity)
                done = []
                for number in range(settings.sessions):
                    done.append(_take_one(agent, (baseline, *candidates), settings, settings.seed + number))
                    self._require_same(before, done[-1].machine)
                    if progress is not None:
                        progress(number + 1, settings.sessions)
                return tuple(done)

            yield take, agent.kind()

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


def _take_one(agent: AgentSession, models: Sequence[Path], settings: TimingSettings, seed: int) -> Session:
    """One session in fresh processes."""
    loaded = [agent.load(path, settings.runtime, settings.threads, settings.affinity) for path in models]
    for model in loaded:
        model.feed_random(seed)
    session = measured(agent, loaded, settings, seed)
    for model in loaded:
        model.unload()
    return session
