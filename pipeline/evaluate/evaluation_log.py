"""Evaluations of a search on disk, one JSON line each: a search that is run again replays up to where it was."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from ..codec import from_json, to_json
from ..types import Candidate


class Memo:
    """Finished evaluations by levels. A line that a killed run left unfinished is cut off.

    Args:
        path: the file; made with the first evaluation.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[int, ...], Candidate] = {}
        data, good = path.read_bytes() if path.is_file() else b"", 0
        for line in itertools.takewhile(lambda part: part.endswith(b"\n"), data.splitlines(keepends=True)):
            try:
                candidate = from_json(Candidate, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):  # no candidate, whatever it is
                break
            self._known[candidate.levels] = candidate
            good += len(line)
        if good < len(data):
            with path.open("r+b") as file:
                file.truncate(good)

    def get(self, levels: tuple[int, ...]) -> Candidate | None:
        """The candidate of these levels, or None if it has not been evaluated."""
        return self._known.get(levels)

    def add(self, candidate: Candidate) -> Candidate:
        """Keep a candidate, and give it back."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(candidate)) + "\n")
        self._known[candidate.levels] = candidate
        return candidate
