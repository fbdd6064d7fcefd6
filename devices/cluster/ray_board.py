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
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ...pipeline.errors import EdgeCompressError, InputError, UnavailableError
from ...pipeline.types import Kind, Timing
from ..board import Board
from ..device import Progress
from ..measure.timing import Ratio, TimingSession, TimingSettings
from ..transport.base import BoardError, BusyError
from ..transport.connection import Array, Connection
from .on_host import ERRORS, OnHost

ADDRESS = "RAY_ADDRESS"
START_S, SHORT_S, LONG_S = 120.0, 120.0, 600.0
_started: list[Any] = []


class RayBoard:
    """A board of another host as a device; see `device.Device`. It is held while something is asked of it."""

    def __init__(self, board: Board) -> None:
        self.name, self.board = board.name, board

    def close(self) -> None:
        """Nothing: an actor ends with what it was started for."""

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """See `device.Device.facts`."""
        with _held(self.board) as hands:
            return dict(hands.ask(SHORT_S, "facts", runtime, threads))

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """See `device.Device.measure`; progress comes at the end."""
        total = settings.sessions + 1
        with _held(self.board) as hands:
            files = (_read(baseline), _read(candidate))
            timing = hands.ask(START_S + total * settings.deadline_s(2), "measure", *files, settings)
        if progress is not None:
            progress(total, total)
        return cast(Timing, timing)

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[TimingSession, ...]:
        """See `device.Device.sessions`."""
        with _held(self.board) as hands:
            files = (_read(baseline), [_read(path) for path in candidates])
            deadline_s = START_S + settings.sessions * settings.deadline_s(1 + len(candidates))
            return tuple(hands.ask(deadline_s, "sessions", *files, settings))

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> RayMeter:
        """See `device.Device.meter`."""
        return RayMeter(self.board, (baseline, runtime, threads, seed))

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """An agent on the board, through its host: what of `Connection` has to do with models."""
        with _held(self.board) as hands:
            hands.ask(START_S, "open")
            yield cast("Connection", _RayConnection(hands, self.name))


class RayMeter:
    """See `device.Meter`."""

    width = 1

    def __init__(self, board: Board, how: tuple[bytes, str, int, int]) -> None:
        self._board, self._how = board, how
        self._stack = contextlib.ExitStack()
        self._hands: _Hands | None = None

    @property
    def dense_ms(self) -> float:
        """See `device.Meter.dense_ms`."""
        return float(self._ask("dense_ms"))

    def ratio(self, candidate: bytes) -> Ratio:
        """See `device.Meter.ratio`."""
        return cast(Ratio, self._ask("ratio", candidate))

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """See `device.Meter.ratios`."""
        return [self.ratio(candidate) for candidate in candidates]

    def close(self) -> None:
        """Give the board back; safe to call twice."""
        self._hands = None
        self._stack.close()

    def _ask(self, what: str, *given: object) -> Any:
        try:
            if self._hands is None:
                self._hands = self._stack.enter_context(_held(self._board))
                self._hands.ask(START_S, "meter", *self._how)
            return self._hands.ask(LONG_S, what, *given)
        except BaseException:
            self.close()
            raise


class _RayConnection:
    """What of an `Connection` has to do with models, on another host."""

    def __init__(self, hands: _Hands, name: str) -> None:
        self._hands, self.name = hands, name

    def kind(self) -> Kind:
        return Kind(self._hands.ask(SHORT_S, "kind"))

    def load(self, path: Path, runtime: str, threads: int, affinity: tuple[int, ...] | None = None) -> _Model:
        return _Model(self._hands, self._hands.ask(LONG_S, "load", _read(path), runtime, threads, affinity))


class _Model:
    """A `LoadedModel` on another host."""

    def __init__(self, hands: _Hands, loaded: tuple[int, str, str]) -> None:
        self._hands = hands
        self.handle, self.package, self.version = loaded

    def run(self, feeds: dict[str, Array], deadline_s: float = 120.0) -> dict[str, Array]:
        return dict(self._hands.ask(deadline_s + SHORT_S, "of_model", self.handle, "run", feeds, deadline_s))

    def feed_random(self, seed: int) -> None:
        self._hands.ask(LONG_S, "of_model", self.handle, "feed_random", seed)

    def peak_rss_bytes(self) -> int:
        return int(self._hands.ask(SHORT_S, "of_model", self.handle, "peak_rss_bytes"))

    def layers(self, runs: int, deadline_s: float) -> tuple[tuple[str, str, float], ...]:
        return tuple(self._hands.ask(deadline_s + SHORT_S, "of_model", self.handle, "layers", runs, deadline_s))

    def unload(self) -> None:
        self._hands.ask(SHORT_S, "of_model", self.handle, "unload")


class _Hands:
    """The actor from here: requests with deadlines, errors as they were."""

    def __init__(self, ray: Any, board: Board) -> None:
        self._ray, self._board = ray, board
        resource = f"board:{board.name}"
        if not ray.cluster_resources().get(resource):
            raise BoardError(
                f"board {board.name}",
                found=f"no host of the cluster has the resource {resource}",
                expected="one that has the way to it",
                do=f"start it there: ray start --address HEAD --resources '{{\"{resource}\": 1}}'",
            )
        self._actor = ray.remote(OnHost).options(resources={resource: 1}, num_cpus=0).remote(board)

    def ask(self, deadline_s: float, what: str, *given: object) -> Any:
        try:
            failed, answer = self._ray.get(self._actor.ask.remote(what, given), timeout=deadline_s)
        except self._ray.exceptions.GetTimeoutError as error:
            starting = what == "ready"
            raise (BusyError if starting else BoardError)(
                f"board {self._board.name}: {'starting on its host' if starting else what}",
                found=f"no answer after {deadline_s:.0f} s",
                expected="an answer",
                do="another run has the board, or its host hangs; see ray status",
            ) from error
        except self._ray.exceptions.RayError as error:
            raise BoardError(
                f"board {self._board.name}: {what}",
                found=f"its host failed ({type(error).__name__})",
                expected="an answer",
                do="see ray status",
            ) from error
        if failed:
            raise ERRORS[failed](answer)
        return answer

    def release(self) -> None:
        with contextlib.suppress(EdgeCompressError):
            self.ask(SHORT_S, "end")
        self._ray.kill(self._actor)


@contextlib.contextmanager
def _held(board: Board) -> Iterator[_Hands]:
    hands = _Hands(_connected(), board)
    try:
        hands.ask(START_S, "ready")
        yield hands
    finally:
        hands.release()


def _connected() -> Any:
    """Ray's module, connected to the cluster of RAY_ADDRESS.

    Raises:
        UnavailableError: Ray is not installed, or the cluster does not answer.
    """
    if not _started:
        try:
            ray = importlib.import_module("ray")
        except ImportError as error:
            raise UnavailableError("ray is not installed", do="pip install 'edge-compress[cluster]'") from error
        try:
            if not ray.is_initialized():
                ray.init(address=os.environ[ADDRESS], log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:300]
            raise UnavailableError(f"Ray at {os.environ[ADDRESS]}", found=text, do=f"start it, or unset {ADDRESS}") from error
        _started.append(ray)
    return _started[0]


def _read(path: Path) -> tuple[str, bytes]:
    try:
        return path.name, path.read_bytes()
    except OSError as error:
        raise InputError(f"model file {path}", found=error.strerror or str(error), expected="a readable file") from error
