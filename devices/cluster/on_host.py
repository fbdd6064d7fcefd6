"""The actor on a board's host, which Ray starts there: it holds the board's device and calls its methods."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...pipeline.errors import BuildError, DeviceError, EdgeCompressError, InputError, UnavailableError
from ..board import Board
from ..opening import open_board
from ..transport.base import BoardError, BusyError

ERRORS = {cls.__name__: cls for cls in (BusyError, BoardError, DeviceError, BuildError, UnavailableError, InputError)}


@dataclass(frozen=True)
class File:
    """A model's file on its way to the board's host."""

    name: str
    data: bytes


class OnHost:
    """Objects by name, the device first. Errors come back as (class, text): Ray wraps exceptions in classes of its own."""

    def __init__(self, board: Board) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="edge-compress-")
        self.objects: dict[str, Any] = {"device": open_board(board)}

    def ask(self, owner: str, what: str, given: Sequence[Any], keep: str) -> tuple[str, Any]:
        """("", the result of a method or the value of a property), or (class of an error, its text).

        Args:
            owner: name of the object.
            what: its method or property.
            given: arguments; a `File`, or a list of files, becomes a path on this host.
            keep: the name under which the result stays here; "" returns it.
        """
        try:
            answer = getattr(self.objects[owner], what)
            if callable(answer):
                answer = answer(*map(self._local, given))
        except EdgeCompressError as error:
            return next((name for name, cls in ERRORS.items() if isinstance(error, cls)), "DeviceError"), str(error)
        if not keep:
            return "", answer
        self.objects[keep] = answer
        return "", None

    def close(self) -> None:
        """Leave nothing running on the board."""
        for one in reversed(self.objects.values()):
            if hasattr(one, "close"):
                one.close()
        self.folder.cleanup()

    def _local(self, given: Any) -> Any:
        if isinstance(given, list):
            return [self._local(one) for one in given]
        if not isinstance(given, File):
            return given
        path = Path(self.folder.name) / sha256(given.data).hexdigest()[:16] / given.name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(given.data)
        return path
