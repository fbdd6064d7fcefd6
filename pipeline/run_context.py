"""Run context: what the stages of one run share, and how long each of them took."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..devices.device import Device
from .codec import from_json, parsed
from .config import Config
from .files import atomic_write, link_or_copy
from .network.compute import Compute
from .options import Pattern
from .progress import Progress
from .run_folder import RunFolder
from .task.load import Loaded


@dataclass
class RunContext:
    """What the stages share."""

    config: Config
    ui: Progress
    folder: RunFolder
    loaded: Loaded
    compute: Compute
    pattern: Pattern  # what is removed
    board: Device  # where artifacts are measured
    seconds: dict[str, float]  # of each stage that ended, also in earlier calls
    notes: list[str] = field(default_factory=list)
    command: str = ""  # that the run is repeated with; "" for this process's own

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say that a stage begins, and keep what it took."""
        start = time.monotonic()
        with self.ui.stage(name):
            yield
        self.seconds[name] = time.monotonic() - start
        atomic_write(_seconds_file(self.folder), json.dumps(self.seconds))


def lend_seconds(folder: RunFolder, other: Path) -> None:
    """Copies the durations of the stages so far to another run folder that has none yet."""
    file = _seconds_file(folder)
    target = other / file.relative_to(folder.path)
    if file.is_file() and not target.exists():
        link_or_copy(file, target)


def read_seconds(folder: RunFolder, note: Callable[[str], None]) -> dict[str, float]:
    """Seconds that finished stages took in earlier calls; `note` is told of a file that cannot be read."""
    file = _seconds_file(folder)
    try:
        found = from_json(dict[str, float], parsed(file.read_bytes()))
        if strange := [name for name, value in found.items() if not 0 <= value < math.inf]:
            raise ValueError(f"{strange[0]}: {found[strange[0]]} seconds")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        note(f"{file.name} is damaged ({error}): the report lacks the times of stages that an earlier call finished.")
        return {}


def _seconds_file(folder: RunFolder) -> Path:
    return folder.path / "stages" / "seconds.json"
