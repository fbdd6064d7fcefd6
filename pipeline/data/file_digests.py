"""Caches the SHA-256 of files between runs: a file is read again only if its size, timestamps or inode changed.

There is one cache file per image folder. A corrupt one, or one of another version, is ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...devices.folders import user_cache
from ..codec import json_sha256
from ..errors import UnavailableError
from ..files import atomic_write

_VERSION = 2


@dataclass(frozen=True)
class FileDigest:
    """The digest of an image file, and whether its EXIF orientation is other than upright."""

    sha256: str
    rotated: bool

    @property
    def valid(self) -> bool:
        """Whether both fields have their types."""
        return isinstance(self.sha256, str) and len(self.sha256) == 64 and isinstance(self.rotated, bool)


def file_digests(root: Path, paths: Sequence[Path], look: Callable[[Path], FileDigest], threads: int) -> list[FileDigest]:
    """Returns the digest of each file, in order, cached where the file is unchanged.

    Args:
        root: the folder of the files; identifies the cache.
        paths: the files.
        look: computes the digest of one file; called from several threads.
        threads: number of threads.
    """
    place = user_cache() / "images" / f"{hashlib.sha256(bytes(root.resolve())).hexdigest()[:32]}.json"
    known = _read(place)
    states = [_state(path) for path in paths]
    keys = [path.as_posix() for path in paths]
    fresh = [i for i, key in enumerate(keys) if known.get(key, ((), None))[0] != states[i]]
    with ThreadPoolExecutor(threads) as pool:
        read = dict(zip(fresh, pool.map(look, [paths[i] for i in fresh]), strict=True))
    found = [read[i] if i in read else known[key][1] for i, key in enumerate(keys)]
    if fresh or len(known) != len(keys):
        _write(place, {key: (state, each) for key, state, each in zip(keys, states, found, strict=True)})
    return found


def _state(path: Path) -> tuple[int, ...]:
    """Returns (size, mtime, ctime, inode): programs can set the mtime, but not the ctime."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read(place: Path) -> dict[str, tuple[tuple[int, ...], FileDigest]]:
    try:
        data = json.loads(place.read_bytes())
        if data["version"] != _VERSION or data["check"] != json_sha256(data["files"]):
            return {}
        found = {key: (tuple(state), FileDigest(*digest)) for key, (state, digest) in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found if all(digest.valid for _, digest in found.values()) else {}


def _write(place: Path, files: dict[str, tuple[tuple[int, ...], FileDigest]]) -> None:
    """Writes the cache; a failure is ignored."""
    plain = {key: [list(state), [digest.sha256, digest.rotated]] for key, (state, digest) in files.items()}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, json.dumps({"version": _VERSION, "files": plain, "check": json_sha256(plain)}))
    except (OSError, UnavailableError, UnicodeError):  # read-only or full file system, undecodable file name
        return
