"""Evaluations of a search on disk, one JSON line each: a search that is run again replays up to where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..codec import from_json, to_json
from ..files import atomic_write
from ..types import Candidate


class Memo:
    """Finished evaluations by levels, each with a digest. A line that does not match its digest is left out and said.

    Args:
        path: the file; made with the first evaluation.
        note: told how many lines were damaged; a last one that a killed run left unfinished is no damage.
    """

    def __init__(self, path: Path, note: Callable[[str], None] = lambda text: None) -> None:
        self._path = path
        self._known: dict[tuple[int, ...], Candidate] = {}
        data = path.read_bytes() if path.is_file() else b""
        lines = data.splitlines(keepends=True)
        for line in lines:
            if (candidate := _read(line)) is not None:
                self._known[candidate.levels] = candidate
        whole = [line for line in lines if line.endswith(b"\n")]
        if damaged := sum(_read(line) is None for line in whole):
            note(f"{damaged} of {len(whole)} kept evaluations are damaged ({path.name}): evaluated again")
        if damaged or len(whole) < len(lines):
            atomic_write(path, "".join(map(_line, self._known.values())))

    def get(self, levels: tuple[int, ...]) -> Candidate | None:
        """The candidate of these levels, or None if it has not been evaluated."""
        return self._known.get(levels)

    def add(self, candidate: Candidate) -> Candidate:
        """Keep a candidate, and give it back."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(candidate))
        self._known[candidate.levels] = candidate
        return candidate


def _line(candidate: Candidate) -> str:
    found = to_json(candidate)
    return json.dumps({**found, "check": _check(found)}) + "\n"


def _read(line: bytes) -> Candidate | None:
    """The candidate of a line; None where it is damaged."""
    try:
        found = json.loads(line)
        check = found.pop("check")
        candidate = from_json(Candidate, found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return candidate if check == _check(found) else None


def _check(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
