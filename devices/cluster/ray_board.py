"""Boards on several hosts, by Ray: each board is a custom resource of the host that has the way to it.

    ray start --address HEAD --resources '{"board:pi-1": 1, "board:pi-2": 1}'      on that host
    RAY_ADDRESS=HEAD edge-compress --target x86 --device class:shelf ...           anywhere

What a board does is done by an actor on its host, which holds the resource while it works: Ray gives a board to one at a
time. The board's file is read here; the host needs edge-compress[cluster] and what ssh or adb need. Ray 2.60,
https://docs.ray.io/en/latest/ray-core/scheduling/resources.html
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ...pipeline.errors import UnavailableError, install_hint
from ...pipeline.types import Timing
from ..board import Board
from ..device import Progress
from ..measure.meter import Meter
from ..measure.timing import Ratio, TimingSession, TimingSettings
from ..transport.base import BoardError, BusyError
from ..transport.connection import Connection, model_bytes
from .on_host import ERRORS, File, OnHost

ADDRESS = "RAY_ADDRESS"
START_S, SHORT_S, LONG_S = 120.0, 120.0, 600.0
STARTED = ("device", "name")  # what an actor is asked first: it answers when it has been placed on the board's host
_started: list[Any] = []


class RayBoard:
    """A board of another host as a device; see `device.Device`. It is held while something is asked of it."""

    def __init__(self, board: Board) -> None:
        self.name, self.board = board.name, board

    def close(self) -> None:
        """Nothing: an actor ends with what it was started for."""

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """See `device.Device.facts`."""
        with _held(self.board) as host:
            return dict(host.ask("device", "facts", runtime, threads))

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """See `device.Device.measure`; progress comes at the end."""
        total = settings.session_limit + 1
        deadline_s = START_S + total * settings.deadline_s(2)
        with _held(self.board) as host:
            timing = host.ask("device", "measure", baseline, candidate, settings, deadline_s=deadline_s)
        if progress is not None:
            progress(total, total)
        return cast(Timing, timing)

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[TimingSession, ...]:
        """See `device.Device.sessions`."""
        deadline_s = START_S + settings.session_limit * settings.deadline_s(1 + len(candidates))
        with _held(self.board) as host:
            return tuple(host.ask("device", "sessions", baseline, list(candidates), settings, deadline_s=deadline_s))

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> RayMeter:
        """See `device.Device.meter`."""
        return RayMeter(self.board, baseline, runtime, threads, seed)

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """An agent on the board, through its host: the part of `Connection` that deals with models."""
        with _held(self.board) as host:
            host.ask("device", "connect", deadline_s=START_S, keep="connection")
            yield cast("Connection", _RayConnection(host, self.name))


class RayMeter(Meter):
    """See `Meter`; the board is held from the first ratio on."""

    def __init__(self, board: Board, *how: object) -> None:
        self._board, self._how = board, how
        self._stack = contextlib.ExitStack()
        self._host: _Host | None = None

    @property
    def dense_ms(self) -> float:
        """See `Meter.dense_ms`."""
        return float(self._ask("dense_ms"))

    def ratio(self, candidate: bytes) -> Ratio:
        """See `Meter.ratio`."""
        return cast(Ratio, self._ask("ratio", candidate))

    def close(self) -> None:
        """Give the board back; safe to call twice."""
        self._host = None
        self._stack.close()

    def _ask(self, what: str, *given: object) -> Any:
        try:
            if self._host is None:
                self._host = self._stack.enter_context(_held(self._board))
                self._host.ask("device", "meter", *self._how, keep="meter")
            return self._host.ask("meter", what, *given, deadline_s=LONG_S)
        except BaseException:
            self.close()
            raise


class _Remote:
    """An object that stays on the board's host; its methods run there."""

    def __init__(self, host: _Host, key: str) -> None:
        self._host, self._key = host, key

    def __getattr__(self, what: str) -> Any:
        def call(*given: object) -> Any:
            return self._host.ask(self._key, what, *given, deadline_s=LONG_S)

        return call() if what in ("package", "version") else call


class _RayConnection(_Remote):
    """The part of `Connection` that deals with models, on another host."""

    def __init__(self, host: _Host, name: str) -> None:
        super().__init__(host, "connection")
        self.name, self._numbers = name, itertools.count()

    def load(self, *given: object) -> _Remote:
        key = f"model {next(self._numbers)}"
        self._host.ask("connection", "load", *given, deadline_s=LONG_S, keep=key)
        return _Remote(self._host, key)


class _Host:
    """The actor as seen from here: requests with deadlines; its errors are raised again in their own classes."""

    def __init__(self, ray: Any, board: Board) -> None:
        self._ray, self._board = ray, board
        resource = f"board:{board.name}"
        if not ray.cluster_resources().get(resource):
            found = f"no host of the cluster has the resource {resource}"
            do = f"start it there: ray start --address HEAD --resources '{{\"{resource}\": 1}}'"
            raise BoardError(f"board {board.name}", found=found, expected="one that has the way to it", do=do)
        self._actor = ray.remote(OnHost).options(resources={resource: 1}, num_cpus=0).remote(board)

    def ask(self, owner: str, what: str, *given: object, deadline_s: float = SHORT_S, keep: str = "") -> Any:
        """See `OnHost.ask`; paths are sent as the files they name."""
        given = tuple(_sent(one) for one in given)
        starting = (owner, what) == STARTED
        where = f"board {self._board.name}: {'starting on its host' if starting else what}"
        try:
            failed, answer = self._ray.get(self._actor.ask.remote(owner, what, given, keep), timeout=deadline_s)
        except self._ray.exceptions.GetTimeoutError as error:
            found, do = f"no answer after {deadline_s:.0f} s", "another run has the board, or its host hangs; see ray status"
            raise (BusyError if starting else BoardError)(where, found=found, expected="an answer", do=do) from error
        except self._ray.exceptions.RayError as error:
            found = f"its host failed ({type(error).__name__})"
            raise BoardError(where, found=found, expected="an answer", do="see ray status") from error
        if failed:
            raise ERRORS[failed](answer)
        return answer

    def release(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.close.remote(), timeout=SHORT_S)
        self._ray.kill(self._actor)


@contextlib.contextmanager
def _held(board: Board) -> Iterator[_Host]:
    host = _Host(_connected(), board)
    try:
        host.ask(*STARTED, deadline_s=START_S)
        yield host
    finally:
        host.release()


def _connected() -> Any:
    """Ray's module, connected to the cluster of RAY_ADDRESS.

    Raises:
        UnavailableError: Ray is not installed, or the cluster does not answer.
    """
    if not _started:
        try:
            ray = importlib.import_module("ray")
        except ImportError as error:
            raise UnavailableError("ray is not installed", do=install_hint("cluster")) from error
        try:
            if not ray.is_initialized():
                ray.init(address=os.environ[ADDRESS], log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:300]
            raise UnavailableError(f"Ray at {os.environ[ADDRESS]}", found=text, do=f"start it, or unset {ADDRESS}") from error
        _started.append(ray)
    return _started[0]


def _sent(given: object) -> object:
    if isinstance(given, list):
        return [_sent(one) for one in given]
    return File(given.name, model_bytes(given)) if isinstance(given, Path) else given
