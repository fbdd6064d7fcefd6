"""This machine as a board: the same agent and the same stream, with no link between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ...pipeline.errors import DeviceError
from .base import CommandTransport


class HereTransport(CommandTransport):
    """Commands of this machine; `folder` is an absolute path."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """See `CommandTransport.command`; a user's own json.py in the current folder stays out of Python's way."""
        return ["env", "PYTHONSAFEPATH=1", *argv]

    def push(self, source: Path, remote: str, deadline_s: float) -> None:
        """See `Transport.push`."""
        self._copied(source, Path(remote))

    def pull(self, remote: str, target: Path, deadline_s: float) -> None:
        """See `Transport.pull`."""
        self._copied(Path(remote), target)

    def _copied(self, source: Path, target: Path) -> None:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise DeviceError(
                f"{self.name}: copying {source.name}", found=os.strerror(error.errno or 0), expected="a copy"
            ) from error
