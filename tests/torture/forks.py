"""The command line in forked children of this process, which has imported everything; how a call ended, and whether it may."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_DOCUMENTED = (0, 1, 2, 3, 4, 130)
_COMPLAINT = "edge-compress: "
_WAIT_S = 0.01
_STAGE = re.compile(r"^([a-z][\w -]*) \.\.\.$", re.MULTILINE)


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    code: int | None  # below 0: by that signal; None: killed after `seconds`
    out: str
    err: str
    seconds: float

    @property
    def stage(self) -> str:
        """The stage that was begun last."""
        found = _STAGE.findall(self.err)
        return found[-1] if found else "before the first stage"

    @property
    def last_line(self) -> str:
        """The end of stderr, for messages."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""

    def fault(self, *, run: bool = False) -> str:
        """Names what is wrong with how it ended; "" where it ended in a documented way.

        Args:
            run: progress on stderr is allowed, and exit code 1 without a line: the report says which gate failed.
        """
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.err:
            return "traceback"
        if self.code < 0:
            return f"ended by signal {-self.code}"
        if self.code not in _DOCUMENTED:
            return f"exit code {self.code}"
        if "\x1b" in self.out + self.err:
            return "raw escape sequence"
        lines = self.err.splitlines()
        complaints = [line for line in lines if line.startswith(_COMPLAINT)]
        if self.code == 0 or (run and self.code == 1 and not complaints):
            return f"exit code {self.code} with {complaints[0]!r}" if complaints else ""
        if len(complaints) != 1 or lines[-1] != complaints[0]:
            return f"{len(complaints)} lines of error, not one at the end"
        return "" if run or len(lines) == 1 else "other lines beside the error"


def forked(work: Sequence[str] | Callable[[], int], *, seconds: float, before: Callable[[], None] | None = None) -> Ended:
    """Runs the command line with these arguments, or a function that returns an exit code, in a child process.

    Args:
        work: the arguments, or the function.
        seconds: after them the child and its own children are killed.
        before: called in the child first: it may replace parts of the program there.
    """
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _be_child(work, files, before, Path(folder))
        code = _waited(child, started + seconds)
        took = time.monotonic() - started
        out, err = (file.read_text(errors="backslashreplace") if file.exists() else "" for file in files)
        return Ended(code, out, err, took)


def _waited(child: int, until: float) -> int | None:
    """The exit code of a child; None where it was killed because the time was over. Nothing of its group is left."""
    code = None
    try:
        while time.monotonic() < until:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break  # still a zombie: its number, and so its group's, is not given to another process
            time.sleep(_WAIT_S)
        else:
            return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
    return code


def _be_child(
    work: Sequence[str] | Callable[[], int], files: Sequence[Path], before: Callable[[], None] | None, folder: Path
) -> None:
    """Never returns."""
    code = 70
    try:
        os.setsid()
        _redirect(files)
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        temporary = folder / "tmp"
        temporary.mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)  # what a killed process leaves goes with its folder
        if before is not None:
            before()
        try:
            code = work() if callable(work) else _main(work)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _main(arguments: Sequence[str]) -> int:
    from edge_compress.pipeline.cli.main import main

    return main(list(arguments))


def _redirect(files: Sequence[Path]) -> None:
    for number, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), errors="backslashreplace", write_through=True)
        for number in (1, 2)
    )


def preload(rehearsal: Callable[[], int], *, seconds: float) -> None:
    """Imports what a rehearsal in a child imports, so that later children have it.

    Nothing is computed in this process: a child has none of the threads that libraries would have started.

    Raises:
        RuntimeError: the rehearsal fails.
    """
    known = set(sys.modules)

    def listed() -> int:
        code = rehearsal()
        print(*(name for name in sys.modules if name not in known), sep="\n")
        return code

    ended = forked(listed, seconds=seconds)
    if ended.code != 0:
        raise RuntimeError(f"the rehearsal ended with {ended.code}: {ended.err}")
    for name in ended.out.split():
        with contextlib.suppress(ImportError, AttributeError, ValueError, KeyError):  # those made while running, by no file
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder in the place of whatever was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
