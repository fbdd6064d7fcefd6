"""Evaluations of a search on disk, one JSON line each: a search that is run again replays up to where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..codec import from_json, json_sha256, to_json
from ..files import atomic_write
from ..types import Candidate


class Memo:
    """Finished evaluations by levels, one line each with its checksum. Corrupt lines are dropped and reported.

    Args:
        path: the file; made with the first evaluation.
        note: called with the number of corrupt lines. A truncated last line, of a killed run, is dropped without a report.
    """

    def __init__(self, path: Path, note: Callable[[str], None] = lambda text: None) -> None:
        self._path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        found = [(line, _read(line)) for line in lines]
        self._known = {candidate.levels: candidate for _, candidate in found if candidate is not None}
        corrupt = sum(candidate is None and line.endswith(b"\n") for line, candidate in found)
        if corrupt:
            note(f"{corrupt} of {len(lines)} kept evaluations are corrupt ({path.name}): evaluated again")
        if corrupt or (lines and not lines[-1].endswith(b"\n")):
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
    return json.dumps({**found, "check": json_sha256(found)}) + "\n"


def _read(line: bytes) -> Candidate | None:
    """Returns the candidate of a line; None where the line is corrupt."""
    try:
        found = json.loads(line)
        check = found.pop("check")
        candidate = from_json(Candidate, found)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return candidate if check == json_sha256(found) else None
