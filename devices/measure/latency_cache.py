"""Latencies measured before, kept between runs: the same structure on the same device is measured once.

The first measurement of a structure is the one every later run sees, so that an interrupted search that is run again
goes the same way. One JSON Lines file for each context (device, cpu, runtime version, threads, dense model, precision).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from ...pipeline.errors import InputError


def cache_folder() -> Path:
    """$EDGE_COMPRESS_CACHE/latency, else edge-compress/latency in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("EDGE_COMPRESS_CACHE", "")
    if own:
        return Path(own) / "latency"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "edge-compress" / "latency"


class LatencyCache:
    """Ratios by structure, for one context.

    Args:
        context: everything besides the structure that a ratio depends on; another value anywhere is another file.
        folder: where the file lies; `cache_folder()` if not given.

    Raises:
        InputError: the folder or file cannot be written.
    """

    def __init__(self, context: Mapping[str, str], folder: Path | None = None) -> None:
        text = json.dumps(dict(context), sort_keys=True)
        place = folder if folder is not None else cache_folder()
        self.path = place / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"
        self._known: dict[str, float] = {}
        self._offset = 0  # everything before it has been read; always the start of a line
        with self._guard():
            place.mkdir(parents=True, exist_ok=True)
            with self._lock():
                if not self.path.exists():
                    self._append(json.dumps({"context": dict(context)}, sort_keys=True))
                self._read()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> float | None:
        """The ratio stored for a structure key, None if it has not been measured."""
        digest = _digest(key)
        if digest not in self._known:
            with self._guard(), self._lock():
                self._read()
        return self._known.get(digest)

    def put(self, key: str, ratio: float) -> float:
        """Store a ratio and return the one that counts: that of the first who stored this key, here or elsewhere.

        Raises:
            InputError: the file cannot be written.
            ValueError: `ratio` is not a positive number.
        """
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"latency ratio {ratio}")
        digest = _digest(key)
        with self._guard(), self._lock():
            self._read()
            if digest not in self._known:
                when = datetime.now(UTC).isoformat(timespec="seconds")
                record = {"key": digest, "ratio": float(ratio), "when": when, "check": _check(digest, float(ratio))}
                self._append(json.dumps(record))
                self._known[digest] = float(ratio)
        return self._known[digest]

    def _read(self) -> None:
        """Take in what was appended since; an unfinished last line is looked at, and again the next time."""
        if not self.path.exists():  # removed from outside; the next append makes it again
            self._offset = 0
            return
        with self.path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() < self._offset:  # cut or replaced from outside
                self._offset = 0
            file.seek(self._offset)
            data = file.read()
        for line in data.split(b"\n"):
            record = _record(line)
            if record is not None:
                self._known.setdefault(*record)
        self._offset += data.rfind(b"\n") + 1

    def _append(self, line: str) -> None:
        """One write, forced to disk; what a killed process left of its line is closed first."""
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + line.encode() + b"\n"
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _lock(self) -> FileLock:
        return FileLock(self.path.with_suffix(".lock"))

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"latency cache {self.path.parent}",
                found=error.strerror or str(error),
                expected="a folder that can be written",
                do="set EDGE_COMPRESS_CACHE to another folder",
            ) from error


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _check(digest: str, ratio: float) -> str:
    return hashlib.sha256(f"{digest} {ratio!r}".encode()).hexdigest()[:8]


def _record(line: bytes) -> tuple[str, float] | None:
    """(key digest, ratio) of a line; None for a torn or damaged one, which is then measured again."""
    try:
        data = json.loads(line)
        digest, ratio = data["key"], float(data["ratio"])
        return (digest, ratio) if data["check"] == _check(digest, ratio) else None
    except (ValueError, KeyError, TypeError):
        return None
