"""What a board's host does for it: the actor that Ray starts there."""

from __future__ import annotations

import contextlib
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...pipeline.errors import BuildError, DeviceError, EdgeCompressError, InputError, UnavailableError
from ...pipeline.types import Timing
from ..board import Board
from ..device import Meter
from ..measure.timing import Ratio, TimingSession, TimingSettings
from ..opening import open_remote
from ..transport.base import BoardError, BusyError

ERRORS = {cls.__name__: cls for cls in (BusyError, BoardError, DeviceError, BuildError, UnavailableError, InputError)}


class OnHost:
    """The actor: what a board's host does for it. Errors come back as (class, text): they are no exceptions of Ray's."""

    def __init__(self, board: Board) -> None:
        self.device = open_remote(board)
        self.folder = tempfile.TemporaryDirectory(prefix="edge-compress-")
        self.stack = contextlib.ExitStack()
        self.models: dict[int, Any] = {}

    def ask(self, what: str, given: tuple[Any, ...]) -> tuple[str, Any]:
        """("", the answer), or (class of an error, its text)."""
        try:
            return "", getattr(self, f"_{what}")(*given)
        except EdgeCompressError as error:
            return next((name for name, cls in ERRORS.items() if isinstance(error, cls)), "DeviceError"), str(error)

    def _ready(self) -> None:
        """It has started."""

    def _facts(self, runtime: str, threads: int) -> dict[str, str]:
        return self.device.facts(runtime, threads)

    def _measure(self, baseline: tuple[str, bytes], candidate: tuple[str, bytes], settings: TimingSettings) -> Timing:
        return self.device.measure(self._file(baseline), self._file(candidate), settings)

    def _sessions(
        self, baseline: tuple[str, bytes], candidates: list[tuple[str, bytes]], settings: TimingSettings
    ) -> tuple[TimingSession, ...]:
        return self.device.sessions(self._file(baseline), [self._file(one) for one in candidates], settings)

    def _meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> None:
        self.its_meter: Meter = self.device.meter(baseline, runtime, threads, seed)

    def _dense_ms(self) -> float:
        return self.its_meter.dense_ms

    def _ratio(self, candidate: bytes) -> Ratio:
        return self.its_meter.ratio(candidate)

    def _open(self) -> None:
        self.session = self.stack.enter_context(self.device.connect())

    def _kind(self) -> str:
        return str(self.session.kind())

    def _load(
        self, file: tuple[str, bytes], runtime: str, threads: int, affinity: tuple[int, ...] | None
    ) -> tuple[int, str, str]:
        model = self.session.load(self._file(file), runtime, threads, affinity)
        self.models[model.handle] = model
        return model.handle, model.package, model.version

    def _of_model(self, handle: int, what: str, *given: object) -> Any:
        return getattr(self.models[handle], what)(*given)

    def _end(self) -> None:
        """Leave nothing running on the board."""
        with contextlib.suppress(AttributeError):
            self.its_meter.close()
        self.stack.close()
        self.device.close()
        self.folder.cleanup()

    def _file(self, file: tuple[str, bytes]) -> Path:
        name, data = file
        path = Path(self.folder.name) / sha256(data).hexdigest()[:16] / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return path
