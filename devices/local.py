"""This machine as a device: fresh worker processes for a figure to be reported, one that stays for a search."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ..pipeline.errors import InputError
from ..pipeline.types import Kind, Timing
from .connection import AgentSession
from .device import QUICK_FEWEST, QUICK_HALF_WIDTH, QUICK_PAIRS, Progress, measure_with
from .measure.timing import Session, TimingSettings
from .transport.here import HereTransport
from .worker_process import WorkerProcess, request_of, session_of

__all__ = ["LocalDevice", "QuickMeter", "WorkerProcess", "describe", "sessions"]


def describe(runtime: str = "onnxruntime", threads: int = 1) -> dict[str, str]:
    """What this machine is to a latency: cpu, governor, runtime version and so on."""
    with contextlib.closing(WorkerProcess()) as worker:
        answer = worker.ask({"op": "describe", "runtime": runtime, "threads": threads}, 120.0, "this machine")
    return {str(k): str(v) for k, v in answer["machine"].items()}


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InputError(
            f"temporary folder {path.parent.parent}", found=error.strerror or str(error), do="set TMPDIR to a folder with space"
        ) from error


def sessions(
    baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
) -> tuple[Session, ...]:
    """The raw samples of `settings.sessions` fresh processes; without candidates, of the baseline alone.

    Raises:
        InputError: a file is not there.
        DeviceError, BuildError, UnavailableError: see `WorkerProcess.ask`.
    """
    models = (baseline, *candidates)
    for path in models:
        if not path.is_file():
            raise InputError(f"model file {path}", found="no such file")
    what = " and ".join(dict.fromkeys(p.name for p in models))
    done = []
    for number in range(settings.sessions):
        with contextlib.closing(WorkerProcess()) as worker:
            request = request_of(models, settings, settings.seed + number)
            done.append(session_of(worker.ask(request, settings.deadline_s(len(models)), what)))
        if progress is not None:
            progress(number + 1, settings.sessions)
    return tuple(done)


class LocalDevice:
    """This machine, under the name of the board that describes it; see `device.Device`."""

    def __init__(self, name: str = "local", affinity: tuple[int, ...] | None = None) -> None:
        self.name, self.affinity = name, affinity

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """See `device.Device.measure`."""
        return measure_with(self.sessions, self.name, baseline, candidate, settings, progress, Kind.MEASURED)

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[Session, ...]:
        """See the function of this name."""
        return sessions(baseline, candidates, replace(settings, affinity=settings.affinity or self.affinity), progress)

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """See `device.Device.facts`."""
        return {k: v for k, v in describe(runtime, threads).items() if k in ("cpu", "runtime_version", "governor")}

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> QuickMeter:
        """See `device.Device.meter`."""
        return QuickMeter(baseline, runtime, threads, affinity=self.affinity, seed=seed)

    @contextlib.contextmanager
    def connect(self) -> Iterator[AgentSession]:
        """The same agent as boards have, in a folder that is gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            transport = HereTransport(self.name, folder)
            with AgentSession(transport, self.name, sys.executable) as session:
                yield session

    def close(self) -> None:
        """Nothing: every worker ends with what it was started for."""


class QuickMeter:
    """See `device.Meter`: one worker of this machine that stays."""

    width = 1

    def __init__(
        self,
        baseline: bytes,
        runtime: str = "onnxruntime",
        threads: int = 1,
        *,
        affinity: tuple[int, ...] | None = None,
        seed: int = 0,
        deadline_s: float = 60.0,
    ) -> None:
        self._settings = TimingSettings(
            threads=threads, affinity=affinity, runtime=runtime, seed=seed, warmup_seconds=0.1, warmup_window=2, max_seconds=30.0
        )
        self._deadline_s = deadline_s
        self._folder = tempfile.TemporaryDirectory(prefix="edge-compress-")
        self._baseline = Path(self._folder.name) / "baseline.model"
        _write(self._baseline, baseline)
        self._worker: WorkerProcess | None = None
        self._dense_ms: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and remove its files; safe to call twice."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._folder.cleanup()

    @property
    def dense_ms(self) -> float:
        """Median latency of the baseline in milliseconds, measured once."""
        if self._dense_ms is None:
            session = self._measure([self._baseline], 40, 40)
            self._dense_ms = session.baseline.quiet_ms()
        return self._dense_ms

    def ratios(self, candidates: Sequence[bytes]) -> list[float]:
        """One after another: there is one machine."""
        return [self.ratio(candidate) for candidate in candidates]

    def ratio(self, candidate: bytes, pairs: int = QUICK_PAIRS, fewest: int = QUICK_FEWEST) -> float:
        """Latency of a candidate as a share of the baseline's, the median of interleaved pairs; < 1 is faster.

        Rounds in which another process took the core are left out.

        Args:
            candidate: the model's file.
            pairs: at most.
            fewest: from here on it ends when half the width of the interval is under `QUICK_HALF_WIDTH` of the ratio.

        Raises:
            DeviceError: the candidate killed the worker (the message names the signal), or took too long.
            BuildError: the runtime refused the candidate.
        """
        path = Path(self._folder.name) / "candidate.model"
        _write(path, candidate)
        return 1.0 / float(np.median(self._measure([self._baseline, path], pairs, fewest).undisturbed()))

    def _measure(self, models: list[Path], pairs: int, fewest: int) -> Session:
        settings = replace(self._settings, min_pairs=min(fewest, pairs), max_pairs=pairs, half_width=QUICK_HALF_WIDTH)
        if self._worker is None or self._worker.process.poll() is not None:
            if self._worker is not None:
                self._worker.close()
            self._worker = WorkerProcess()
        answer = self._worker.ask(request_of(models, settings, settings.seed), self._deadline_s, "a candidate of the search")
        return session_of(answer)
