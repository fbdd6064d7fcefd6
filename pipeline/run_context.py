"""Run context: what the stages of one run share, and how long each of them took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..devices.device import Device
from .compute import Compute
from .config import Config
from .files import atomic_write
from .progress import Progress
from .run_folder import RunFolder
from .task.load import Loaded
from .types import Pattern


@dataclass
class Run:
    """What the stages share."""

    config: Config
    ui: Progress
    folder: RunFolder
    loaded: Loaded
    compute: Compute
    pattern: Pattern  # what is removed
    board: Device  # where artifacts are measured
    seconds: dict[str, float]  # of each stage, when it last ran to its end; kept in the folder, for runs that go on
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say that a stage begins, and keep what it took."""
        start = time.monotonic()
        with self.ui.stage(name):
            yield
        self.seconds[name] = time.monotonic() - start
        atomic_write(_seconds_file(self.folder), json.dumps(self.seconds))


def read_seconds(folder: RunFolder) -> dict[str, float]:
    """What finished stages took in earlier calls; a file that cannot be read only costs the report these figures."""
    try:
        return {str(name): float(value) for name, value in json.loads(_seconds_file(folder).read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _seconds_file(folder: RunFolder) -> Path:
    return folder.path / "stages" / "seconds.json"
