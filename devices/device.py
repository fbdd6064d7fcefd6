"""Protocols of what can be measured on: this machine, a board behind a transport, or a class of boards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..pipeline.types import Kind, Timing
from .measure.timing import Ratio, TimingSession, TimingSettings, build_timing

if TYPE_CHECKING:
    from .transport.connection import Connection

Progress = Callable[[int, int], None]  # sessions done, sessions in all
# (baseline, candidates, settings, progress) -> one TimingSession for each fresh process
Take = Callable[[Path, Sequence[Path], TimingSettings, Progress | None], tuple[TimingSession, ...]]


class Meter(Protocol):
    """Latency ratios of many candidates against one baseline: a search's inner loop.

    Cheap and a little biased by what one process is like; what is reported is measured again by `Device.measure`.
    """

    @property
    def width(self) -> int:
        """How many candidates are measured at once: one on each board."""
        ...

    @property
    def dense_ms(self) -> float:
        """Median latency of the baseline in milliseconds, measured once."""
        ...

    def ratio(self, candidate: bytes) -> Ratio:
        """Latency of a candidate (the model's file) as a share of the baseline's; < 1 is faster.

        Raises:
            DeviceError: the candidate killed its process, took too long, or the board failed.
            BuildError: the runtime refused the candidate.
        """
        ...

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """The same for several, in order; on several boards at once where there are more than one."""
        ...

    def close(self) -> None:
        """Leave nothing running; safe to call twice."""
        ...


class Device(Protocol):
    """Where artifacts are run and timed. Nothing is connected until something is asked of it."""

    @property
    def name(self) -> str:
        """Of the board, or of the class of boards."""
        ...

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """Latency of `candidate` against `baseline`, and of `baseline` against a copy of itself (the noise floor).

        Args:
            baseline: the dense float model's file.
            candidate: the artifact's file.
            settings: the protocol's numbers; without an affinity, the board's own.
            progress: called after each session, the control included.

        Raises:
            InputError, DeviceError, BuildError, UnavailableError: a file is not there, the device failed, the runtime
                refused a model or is not there.
        """
        ...

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[TimingSession, ...]:
        """The raw samples of `settings.sessions` fresh processes; without candidates, of the baseline alone."""
        ...

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """What a latency on this device depends on besides the model: processor, runtime version, power mode and so on."""
        ...

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> Meter:
        """Quick ratios against a baseline (the model's file)."""
        ...

    def connect(self) -> AbstractContextManager[Connection]:
        """An agent there, to be closed: outputs, profiles by layer, memory."""
        ...

    def close(self) -> None:
        """Leave nothing running here; safe to call twice."""
        ...


def measure_with(
    take: Take, name: str, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None, kind: Kind
) -> Timing:
    """The figures of some sessions and of a control, the baseline against itself, however the sessions are taken.

    `take` gives the sessions, `name` is the device's, `kind` what the times are; the rest is `Device.measure`'s.
    """
    total = settings.sessions + 1

    def step(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    measured = take(baseline, [candidate], settings, step)
    seed = settings.seed + settings.sessions
    control = take(baseline, [baseline], replace(settings, sessions=1, seed=seed), lambda *_: step(total, total))
    return build_timing(name, measured, control[0], settings, kind=kind)
