"""Reports progress on stderr: a line per stage and a bar for long work. stdout is not touched."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

WORTH_TELLING_S = 5.0


class Bar(Protocol):
    """Progress of one long piece of work."""

    def advance(self, n: int = 1, text: str = "") -> None:
        """Counts `n` more steps; `text` is shown beside the bar, such as the best reward so far."""
        ...


class Progress:
    """Writes progress: moving bars on a terminal; plain lines anywhere else, at most ten per bar.

    Args:
        stream: text goes here; standard error when None.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)

    def say(self, text: str) -> None:
        """Writes one line."""
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
        if not self._console.is_terminal:
            yield _Lines(self, description, total)
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
            yield _Live(live, live.add_task(description, total=total, text=""))


class _Live:
    def __init__(self, live: RichProgress, task: Any) -> None:
        self._live, self._task = live, task

    def advance(self, n: int = 1, text: str = "") -> None:
        self._live.update(self._task, advance=n, text=text)


class _Lines:
    """Writes a line at each tenth of the way, for logs."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress, self._description, self._total = progress, description, total
        self._done, self._start = 0, time.monotonic()

    def advance(self, n: int = 1, text: str = "") -> None:
        before, self._done = self._done, self._done + n
        if self._done * 10 // max(self._total, 1) > before * 10 // max(self._total, 1):
            shown = [f"  {self._description}: {self._done}/{self._total}", text, self._left()]
            self._progress.say(", ".join(part for part in shown if part))

    def _left(self) -> str:
        """How long the rest will take if it goes on like this; nothing about what is over soon."""
        spent = time.monotonic() - self._start
        left = spent / self._done * (self._total - self._done)
        return f"about {_span(left)} left" if min(spent, left) > WORTH_TELLING_S else ""


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
