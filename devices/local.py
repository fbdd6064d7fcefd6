"""This machine as a device: fresh worker processes for a figure to be reported, one that stays for a search."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from ..pipeline.errors import BuildError, DeviceError, EdgeCompressError, InputError, UnavailableError
from ..pipeline.types import Kind, Timing
from .timing import Samples, Session, TimingSettings, build_timing

Progress = Callable[[int, int], None]  # sessions done, sessions in all
# (baseline, candidates, settings, progress) -> one Session for each fresh process
Take = Callable[[Path, Sequence[Path], TimingSettings, Progress | None], tuple[Session, ...]]
QUICK_HALF_WIDTH = 0.015  # of a ratio; the noise between two measurements of one candidate is larger


class WorkerProcess:
    """A running worker. Every request has a deadline, and a worker that dies is an error with a name, never a hang."""

    def __init__(self) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        # -P: a user's own numpy.py or json.py in the current folder stays out
        command = [sys.executable, "-P", "-m", "edge_compress.devices.worker"]
        quiet = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # numpy's threads; the runtime gets its own number
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=os.environ | quiet
        )

    def ask(self, request: Mapping[str, Any], deadline_s: float, what: str) -> dict[str, Any]:
        """The worker's answer.

        Args:
            request: see worker.py.
            deadline_s: seconds until the worker is killed.
            what: names the work in messages, for example the model's file name.

        Raises:
            DeviceError: the worker died or took too long, or an inference failed.
            BuildError: the runtime refused a model.
            UnavailableError: the runtime is not installed.
            InputError: the request asks for what this machine does not have.
        """
        try:
            line = self._exchange(json.dumps(request).encode() + b"\n", time.monotonic() + deadline_s)
        except TimeoutError as error:
            self.close()
            raise DeviceError(
                f"measuring {what}",
                found=f"no answer after {deadline_s:.0f} s",
                expected="an answer",
                do="the process was stopped; try more threads, or leave the machine idle",
            ) from error
        except BaseException:  # an interrupt too: the next answer would be that of another request
            self.close()
            raise
        if line is None:
            how = self._how_it_ended()
            self.close()
            raise DeviceError(
                f"measuring {what}", found=how, expected="an answer", do="the runtime crashed or was killed on this machine"
            )
        return _checked(json.loads(line), what)

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):  # what was not written yet has no reader any more
                stream and stream.close()

    def _exchange(self, line: bytes, deadline: float) -> bytes | None:
        """Write a line, read a line; None when the worker is gone, TimeoutError at the deadline."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise ValueError("worker without pipes")
        try:
            os.write(stdin.fileno(), line)
        except BrokenPipeError:
            return None
        poll, parts = select.poll(), [b""]
        poll.register(stdout.fileno(), select.POLLIN)
        while not parts[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError
            parts.append(os.read(stdout.fileno(), 1 << 16))
            if not parts[-1]:
                return None
        return b"".join(parts)

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closes a moment before it can be waited for
            self.process.wait(5)
        code = self.process.poll()
        if code is not None and code < 0:
            return f"its process ended by signal {_signal_name(-code)}"
        self._stderr.seek(0)
        lines = self._stderr.read()[-2000:].decode(errors="replace").strip().splitlines()
        return f"its process ended with exit code {code}" + (f" ({lines[-1]})" if lines else "")


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in {s.value for s in signal.Signals} else str(number)


def _checked(answer: dict[str, Any], what: str) -> dict[str, Any]:
    """The answer, or the error it carries."""
    if answer["ok"]:
        return answer
    text = str(answer["error"])
    raised: dict[str, EdgeCompressError] = {
        "load": BuildError(f"the runtime refused {what}", found=text),
        "run": DeviceError(f"inference failed while measuring {what}", found=text),
        "runtime": UnavailableError("the runtime is not installed", found=text, do="install it into this environment"),
        "request": InputError("latency settings", found=text),
    }
    raise raised[answer["kind"]]


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


def _request(models: Sequence[Path], settings: TimingSettings, seed: int) -> dict[str, Any]:
    return {
        "op": "measure",
        "runtime": settings.runtime,
        "threads": settings.threads,
        "affinity": list(settings.affinity) if settings.affinity else None,
        "models": [str(m.resolve()) for m in models],
        "seed": seed,
        "min_pairs": settings.min_pairs,
        "max_pairs": settings.max_pairs,
        "max_seconds": settings.max_seconds,
        "half_width": settings.half_width,
        "block": settings.block,
        "min_sample_ms": settings.min_sample_ms,
        "warmup_seconds": settings.warmup_seconds,
        "warmup_window": settings.warmup_window,
    }


def session_of(answer: Mapping[str, Any]) -> Session:
    """The samples in an answer of worker.py to `measure`."""
    first, *others = [
        Samples(np.array(m["wall_ns"], dtype=np.float64), np.array(m["cpu_ns"], dtype=np.float64), int(m["k"]))
        for m in answer["models"]
    ]
    return Session(
        baseline=first,
        candidates=tuple(others),
        stop=str(answer["stop"]),
        warmup_s=float(answer["warmup_s"]),
        temperatures_c=tuple(tuple(map(float, r)) for r in answer["temperatures_c"]),
        frequencies_mhz=tuple(tuple(map(float, r)) for r in answer["frequencies_mhz"]),
        peak_rss_bytes=int(answer["peak_rss_bytes"]),
        machine={str(k): str(v) for k, v in answer["machine"].items()},
    )


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
            request = _request(models, settings, settings.seed + number)
            done.append(session_of(worker.ask(request, settings.deadline_s(len(models)), what)))
        if progress is not None:
            progress(number + 1, settings.sessions)
    return tuple(done)


def measure_with(
    take: Take, name: str, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None, kind: Kind
) -> Timing:
    """The figures of some sessions and of a control, the baseline against itself, however the sessions are taken.

    `take` gives the sessions, `name` is the device's, `kind` what the times are; the rest is `LocalDevice.measure`'s.
    """
    total = settings.sessions + 1

    def step(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    measured = take(baseline, [candidate], settings, step)
    seed = settings.seed + settings.sessions
    control = take(baseline, [baseline], replace(settings, sessions=1, seed=seed), lambda *_: step(total, total))
    return build_timing(name, measured, control[0], settings, kind=kind)


class LocalDevice:
    """This machine, under the name of the board that describes it."""

    def __init__(self, name: str = "local") -> None:
        self.name = name

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """Latency of `candidate` against `baseline`, and of `baseline` against a copy of itself (the noise floor).

        Args:
            baseline: the dense float model's file.
            candidate: the artifact's file.
            settings: the protocol's numbers.
            progress: called after each session, the control included.

        Raises:
            InputError, DeviceError, BuildError, UnavailableError: see `sessions`.
        """
        return measure_with(sessions, self.name, baseline, candidate, settings, progress, Kind.MEASURED)

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[Session, ...]:
        """See the function of this name."""
        return sessions(baseline, candidates, settings, progress)


class QuickMeter:
    """Latency ratios of many candidates against one baseline, from one worker that stays: a search's inner loop.

    Cheap and a little biased by what one process is like; what is reported is measured again by `LocalDevice`.
    """

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

    def ratio(self, candidate: bytes, pairs: int = 24, fewest: int = 12) -> float:
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
        answer = self._worker.ask(_request(models, settings, settings.seed), self._deadline_s, "a candidate of the search")
        return session_of(answer)
