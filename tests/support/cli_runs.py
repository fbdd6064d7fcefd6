"""The command line as a user has it: a process of its own, its progress as it comes, signals sent while it works."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from edge_compress.devices.measure import meter
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.verify import artifact, unpruned

COMMAND = str(Path(sys.executable).with_name("edge-compress"))
USER_NET = Path(__file__).with_name("user_net.py")
BUDGET = 0.6
EVALUATIONS = 20
EPOCHS = 2
# what a shell starts in the background ignores Ctrl-C, and so does what that starts: the tests may have been started so
_INTERRUPTIBLE = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
DEADLINE = 600.0  # seconds until a process is taken for hung


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    code: int  # below 0: by that signal
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line it complained with. Beside it there may only be progress."""
        lines = [line for line in self.err.splitlines() if not PROGRESS.match(line)]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("edge-compress: "), self.err
        return lines[0]

    @property
    def stages(self) -> list[str]:
        """The stages that were begun, in order."""
        return [line.removesuffix(" ...") for line in self.err.splitlines() if re.fullmatch(r"[a-z][\w -]* \.\.\.", line)]


def without_progress(err: str) -> str:
    """What is on stderr beside progress."""
    return "".join(line for line in err.splitlines(keepends=True) if not PROGRESS.match(line))


PROGRESS = re.compile(r"  |[a-z][\w -]* \.\.\.$|[a-z][\w -]*: done in ")


class Started:
    """A process at work."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", _INTERRUPTIBLE, COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,  # a group of its own, so that a signal reaches its workers too
        )
        self._lines: list[str] = []
        self._out: list[str] = []
        self._changed = threading.Condition()
        self._readers = [threading.Thread(target=self._read_progress), threading.Thread(target=self._read_output)]
        for reader in self._readers:
            reader.start()

    def _read_progress(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        self._out.append(self.process.stdout.read())

    def wait_for(self, start: str) -> None:
        """Return as soon as a line that starts so is on stderr."""
        with self._changed:
            seen = self._changed.wait_for(
                lambda: any(line.startswith(start) for line in self._lines) or not self._readers[0].is_alive(), DEADLINE
            )
        assert seen, f"no {start!r} in {DEADLINE} s"
        assert any(line.startswith(start) for line in self._lines), f"ended without {start!r}: {''.join(self._lines)}"

    def send(self, number: signal.Signals) -> Finished:
        """Signal the whole group and see how it ends."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        return self.finish()

    def finish(self) -> Finished:
        """Wait for the end."""
        self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.join(DEADLINE)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return Finished(self.process.returncode, "".join(self._out), "".join(self._lines))


@dataclass(frozen=True)
class Workshop:
    """Trained networks, data and a latency cache, shared by all runs of the session."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def npz(self) -> Path:
        return self.folder / "digits.npz"

    def weights(self, factory: str, suffix: str = ".safetensors") -> Path:
        return self.folder / f"{factory}{suffix}"

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"EDGE_COMPRESS_CACHE": str(self.cache)}

    def arguments(self, out: Path, **changed: object) -> list[str]:
        """The session's usual run into `out`; `min_speedup=2` adds or replaces `--min-speedup 2`."""
        options: dict[str, object] = {
            "target": "x86",
            "model": f"{USER_NET}:projected",
            "weights": self.weights("projected"),
            "data": "digits",
            "evaluations": EVALUATIONS,
            "finetune_epochs": EPOCHS,
            "latency_budget": BUDGET,
            "max_accuracy_drop": 20,
            "out": out,
        } | changed
        if options["target"] == "x86":  # else beside other tests the small network may be measured to be faster in float
            options.setdefault("precision", "int8")
        return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]

    @contextmanager
    def start(self, arguments: Sequence[str]) -> Iterator[Started]:
        """A process that is gone afterwards, whatever happened."""
        started = Started(arguments, self.environment)
        try:
            yield started
        finally:
            started.send(signal.SIGKILL)

    @contextmanager
    def inside(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Where this process can be the command line's; it is as before afterwards."""
        patch.setenv("EDGE_COMPRESS_CACHE", str(self.cache))
        patch.setattr(signal, "signal", lambda *_: None)
        # beside other tests no interval gets narrow; what a session costs is the start of a process
        patch.setattr(
            artifact, "TimingSettings", lambda **given: TimingSettings(**given | {"sessions": 3, "most_sessions": None})
        )
        patch.setattr(unpruned, "SESSIONS", 2)
        patch.setattr(meter, "QUICK_SECONDS", 0.0)
        threads = torch.get_num_threads()
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)

    def call(self, arguments: Sequence[str]) -> Finished:
        """The command line inside this process: a new one imports and warms up for ten seconds and more."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, self.inside(patch), redirect_stdout(out), redirect_stderr(err):
            code = main(list(arguments))
        return Finished(code, out.getvalue(), err.getvalue())

    def run(self, arguments: Sequence[str]) -> Finished:
        """A process from its start to its end."""
        with self.start(arguments) as started:
            return started.finish()


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def passed_but_for_speed(finished: Finished, folder: Path) -> bool:
    """Whether a run passed all gates but perhaps that of the speedup: beside other tests a small network's interval is wide."""
    if finished.code == 0:
        return True
    reasons = [reason for target in report_of(folder)["targets"].values() for reason in target["verdict"]["reasons"]]
    return finished.code == 1 and bool(reasons) and all(reason.startswith("speedup: ") for reason in reasons)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with the time of its last change and its bytes."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
