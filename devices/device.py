"""Devices to measure on: this machine, a board behind a transport, or a class of boards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from ..pipeline.types import Timing
from .measure.meter import Meter
from .measure.timing import TimingSession, TimingSettings
from .transport.connection import Connection

Progress = Callable[[int, int], None]  # sessions done, sessions in all


class Device(Protocol):
    """A device that runs and times artifacts. It connects with the first request."""

    @property
    def name(self) -> str:
        """Of the board, or of the class of boards."""

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """Latency of `candidate` against `baseline`, and of `baseline` against a copy of itself (the noise floor).

        Without an affinity in the settings the board's own is used; `progress` is called after each session, control included.

        Raises:
            InputError, DeviceError, BuildError, UnavailableError: a file is not there, the device failed, the runtime
                refused a model or is not there.
        """

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[TimingSession, ...]:
        """The raw samples of `sessions` (up to `most_sessions`) fresh processes; without candidates, of the baseline alone."""

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """Facts that a latency on this device depends on besides the model: processor, runtime version, power mode and so on."""

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> Meter:
        """Quick ratios against a baseline (the model's file)."""

    def connect(self) -> AbstractContextManager[Connection]:
        """An agent there, to be closed: outputs, profiles by layer, memory."""

    def close(self) -> None:
        """Leave nothing running here; safe to call twice."""
