"""Reports progress on stderr, and in a log file: a line per stage and a bar for long work. stdout is not touched."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from .errors import printable

WORTH_TELLING_S = 5.0
LOGGED_EVERY_S = 1.0  # a training step takes milliseconds, and a log of all of them nobody reads


class Bar(Protocol):
    """Progress of one long piece of work."""

    def advance(self, n: int = 1, text: str = "") -> None:
        """Counts `n` more steps; `text` is shown beside the bar, such as the best reward so far."""
        ...


class Progress:
    """Writes progress: moving bars on a terminal; plain lines anywhere else, at most ten per bar.

    Args:
        stream: text goes here; standard error when None.
        quiet: nothing is written there.
        verbose: lines instead of bars, one for each step.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, verbose: bool = False) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._verbose = quiet, verbose
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        self._log: TextIO | None = None

    @contextlib.contextmanager
    def logged(self, path: Path) -> Iterator[None]:
        """Also appends all lines to a file, with the time; of long work, a line a second and one at each tenth of the way."""
        try:
            file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            self.say(f"no log is written: {path}: {error.strerror}")
            yield
            return
        with contextlib.closing(file):
            before, self._log = self._log, file
            try:
                yield
            except BaseException as error:
                self._keep(f"stopped: {str(error) or type(error).__name__}")
                raise
            finally:
                self._log = before

    def say(self, text: str) -> None:
        """Writes one line; control characters in it, which names of files and errors of foreign code can have, are escaped."""
        text = printable(text)
        self._keep(text)
        if self._quiet:
            return
        if self._console.is_terminal:
            self._console.print(text, soft_wrap=True)  # above a bar, if there is one
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Writes a line when a stage starts, and one with its wall time when it has ended without an error."""
        self.say(f"{name} ...")
        start = time.monotonic()
        yield
        self.say(f"{name}: done in {_span(time.monotonic() - start)}")

    @contextlib.contextmanager
    def bar(self, description: str, total: int) -> Iterator[Bar]:
        """Shows a bar for `total` steps until the work has ended."""
        description = printable(description)
        if self._quiet or self._verbose or not self._console.is_terminal:
            tell = self._keep if self._quiet else self.say
            yield (
                _Lines(description, total, tell, self.say)
                if self._verbose
                else _Lines(description, total, tell, self._keep, LOGGED_EVERY_S)
            )
            return
        name, note = (TextColumn(field, markup=False) for field in ("  {task.description}", "{task.fields[text]}"))
        with RichProgress(
            name,
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            note,
            console=self._console,
            transient=True,
            redirect_stdout=False,
        ) as live:
            lines = _Lines(description, total, self._keep, self._keep, LOGGED_EVERY_S)
            yield _Live(live, live.add_task(description, total=total, text=""), lines)

    def _keep(self, text: str) -> None:
        """Writes a line into the log, if there is one."""
        if self._log is None:
            return
        try:
            self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {printable(text)}\n")
        except OSError as error:
            self._log = None
            self.say(f"the log ends here: {error.strerror}")


class _Live:
    def __init__(self, live: RichProgress, task: Any, lines: _Lines) -> None:
        self._live, self._task, self._lines = live, task, lines

    def advance(self, n: int = 1, text: str = "") -> None:
        self._live.update(self._task, advance=n, text=printable(text))
        self._lines.advance(n, text)


class _Lines:
    """Lines for the steps: at each tenth of the way to `tell`, the others to `detail`, one in `every_s` seconds at most."""

    def __init__(
        self, description: str, total: int, tell: Callable[[str], None], detail: Callable[[str], None], every_s: float = 0.0
    ) -> None:
        self._description, self._total, self._tell, self._detail = description, total, tell, detail
        self._done, self._start = 0, time.monotonic()
        self._every_s, self._last = every_s, -every_s

    def advance(self, n: int = 1, text: str = "") -> None:
        before, self._done = self._done, self._done + n
        tenth = self._done * 10 // max(self._total, 1) > before * 10 // max(self._total, 1)
        if not tenth and time.monotonic() < self._last + self._every_s:
            return
        self._last = time.monotonic()
        shown = [f"  {self._description}: {self._done}/{self._total}", text, self._left()]
        (self._tell if tenth else self._detail)(", ".join(part for part in shown if part))

    def _left(self) -> str:
        """How long the rest will take if it goes on like this; nothing about what is over soon."""
        spent = time.monotonic() - self._start
        left = spent / self._done * (self._total - self._done)
        return f"about {_span(left)} left" if min(spent, left) > WORTH_TELLING_S else ""


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
