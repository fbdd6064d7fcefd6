"""Latencies measured before, kept between runs: the same structure on the same device is measured once a month.

The first measurement of a structure is the one that later runs see, so that an interrupted search that is run again goes the
same way. A noisy one counts for half a day, long enough for that, and is measured again after it; so is one older than
`MAX_AGE`. One JSON Lines file for each context (host, device, cpu, runtime version, threads, dense model, precision).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock, Timeout

from ...pipeline.errors import InputError, UnavailableError, says_full
from ..folders import cache_folder
from .timing import Ratio

MAX_AGE = timedelta(days=30)  # until updates of system, firmware and what else runs on a machine make it another one
NOISY_MAX_AGE = timedelta(hours=12)  # an interrupted run is resumed by then; a busy day poisons no later search
LOCK_S = 120.0  # a lock is held while a few lines are read or written
_SKEW = timedelta(days=1)  # a clock may be wrong by so much


class LatencyCache:
    """Ratios by structure, for one context: everything else that a ratio depends on. Another value in it is another file.

    Raises:
        InputError: the folder or file cannot be written.
        UnavailableError: another process holds the lock, or the disk is full.
    """

    def __init__(self, context: Mapping[str, str], folder: Path | None = None) -> None:
        text = json.dumps(dict(context), sort_keys=True)
        place = folder if folder is not None else cache_folder()
        self.path = place / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"
        self._known: dict[str, Ratio] = {}  # those that count, and those that this run measured
        self._offset = 0  # everything before it has been read; always the start of a line
        with self._locked():
            if not self.path.exists():
                self._append(json.dumps({"context": dict(context)}, sort_keys=True))
            self._read()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> float | None:
        """The value of the ratio that counts for a structure key; None if it is to be measured, for the first time or again."""
        known = self.ratio(key)
        return None if known is None else known.value

    def ratio(self, key: str) -> Ratio | None:
        """The same with its uncertainty."""
        digest = _digest(key)
        if digest not in self._known:
            with self._locked():
                self._read()
        return self._known.get(digest)

    def put(self, key: str, ratio: Ratio) -> float:
        """Store a ratio and return the one that counts: that of the first who stored one that still counts, here or elsewhere.

        Raises:
            InputError: the file cannot be written.
            UnavailableError: the disk is full.
        """
        digest = _digest(key)
        with self._locked():
            self._read()
            if digest not in self._known:
                self._append(_line(digest, ratio))
                self._known[digest] = ratio
        return self._known[digest].value

    def _read(self) -> None:
        """Take in what was appended since; an unfinished last line is looked at, and again the next time."""
        if not self.path.exists():  # removed from outside; the next append makes it again
            self._offset = 0
            return
        with os.fdopen(_opened(self.path, os.O_RDONLY), "rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() < self._offset:  # cut or replaced from outside
                self._offset = 0
            file.seek(self._offset)
            data = file.read()
        for record in filter(None, map(_valid, data.split(b"\n"))):
            self._known.setdefault(*record)
        self._offset += data.rfind(b"\n") + 1

    def _append(self, line: str) -> None:
        """One write, forced to disk; what a killed process left of its line is closed first."""
        descriptor = _opened(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + line.encode() + b"\n"
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), LOCK_S):
                yield
        except Timeout as error:
            raise UnavailableError(
                f"latency cache {self.path.parent}",
                found=f"another process has held its lock for {LOCK_S:.0f} s",
                do="end that process, or set EDGE_COMPRESS_CACHE to another folder",
            ) from error
        except OSError as error:
            what, do = f"latency cache {self.path.parent}", "set EDGE_COMPRESS_CACHE to another folder"
            found = error.strerror or str(error)
            if says_full(error):
                raise UnavailableError(what, found=found, do=f"free some space, or {do}") from error
            raise InputError(what, found=found, expected="a folder that can be written", do=do) from error


def _opened(path: Path, flags: int) -> int:
    """A descriptor of a regular file; a named pipe in its place would wait for its other end, with the lock held.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _line(digest: str, ratio: Ratio) -> str:
    """A measurement as a line of the file, with a check against damage."""
    found = {"key": digest, "ratio": ratio.value, "half_width": ratio.half_width, "when": datetime.now(UTC).isoformat()}
    return json.dumps({**found, "check": _check(found)})


def _valid(line: bytes) -> tuple[str, Ratio] | None:
    """Digest and ratio in a line; None for one that is torn, damaged, impossible or too old and is measured again."""
    try:
        data = json.loads(line)
        ratio = Ratio(float(data["ratio"]), float(data["half_width"]))
        age = datetime.now(UTC) - datetime.fromisoformat(data["when"])
        whole = data["check"] == _check(data)
        counts = -_SKEW <= age <= (NOISY_MAX_AGE if ratio.is_noisy else MAX_AGE)
        return (str(data["key"]), ratio) if whole and counts else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _check(data: Mapping[str, object]) -> str:
    text = json.dumps({key: value for key, value in data.items() if key != "check"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
