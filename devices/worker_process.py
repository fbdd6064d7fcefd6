"""A worker process of this machine, see worker.py: every request has a deadline, and how it died is an answer."""

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..pipeline.errors import BuildError, DeviceError, EdgeCompressError, InputError, UnavailableError
from .measure.timing import Samples, Session, TimingSettings


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


def request_of(models: Sequence[Path], settings: TimingSettings, seed: int) -> dict[str, Any]:
    """The request to worker.py that measures these models."""
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
        machine={str(k): str(v) for k, v in answer["machine"].items() if v},
    )
