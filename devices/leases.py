"""Per-board locks and failure counts: one file for each board, locked (fcntl) while a process of this machine has it.

The files are in $EDGE_COMPRESS_CACHE/boards, else in edge-compress/boards of $XDG_CACHE_HOME or ~/.cache. A board is known by
its transport and address, so that two board files with one address are one board. Users of other machines are kept
away by the agent's own lock on the board.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from filelock import FileLock, Timeout

from ..pipeline.errors import InputError
from .board import Board
from .folders import user_cache
from .transport.base import BusyError

SET_ASIDE = 3  # failures in a row after which a pool leaves a board alone


def lease(board: Board) -> FileLock:
    """The acquired lock of a board: taken at once or not at all, and released by `release`.

    Raises:
        BusyError: another process of this machine, or another measurement of this one, has it.
        InputError: the folder of the locks cannot be written.
    """
    path = _file(board, ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0, thread_local=False)
        lock.acquire()
    except Timeout as error:
        found, do = "it is busy: another process of this machine measures on it", "wait until that has ended"
        raise BusyError(f"board {board.name}", found=found, expected="a board of one's own", do=do) from error
    except OSError as error:
        raise InputError(
            f"folder {path.parent}", found=error.strerror or str(error), do="set EDGE_COMPRESS_CACHE to another folder"
        ) from error
    return lock


def failures(board: Board) -> tuple[int, str]:
    """(times in a row that it failed in a pool, what it failed with last)."""
    try:
        data = json.loads(_file(board, ".json").read_bytes())
        return int(data["failures"]), str(data["last"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0, ""


def note_failure(board: Board, error: Exception) -> None:
    """Count a failure. The caller has the board's lease."""
    record = {"board": board.name, "failures": failures(board)[0] + 1, "last": str(error)}
    path = _file(board, ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record) + "\n", encoding="utf-8")
    part.replace(path)  # whole or not at all: half a record would count as none


def forgive(board: Board) -> None:
    """Count from zero again: the board has worked, or `devices check` found it well."""
    _file(board, ".json").unlink(missing_ok=True)


def _file(board: Board, suffix: str) -> Path:
    name = re.sub(r"[^\w.@-]", "_", f"{board.transport}-{board.address}")
    return user_cache() / "boards" / f"{name}{suffix}"
