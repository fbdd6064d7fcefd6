"""SHA-256 of many files, kept between runs: a file is read again only when its size or one of its times has changed.

One file in the cache folder for each image folder. It is a matter of speed alone: damaged, or written by another version, it is
left aside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...devices.measure.latency_cache import cache_folder
from ..codec import json_sha256
from ..errors import UnavailableError
from ..files import atomic_write

_VERSION = 1


@dataclass(frozen=True)
class Looked:
    """What was seen of a file when it was read."""

    sha256: str
    turned: bool  # an image with an orientation other than upright

    @property
    def valid(self) -> bool:
        """Whether the values are of their types."""
        return isinstance(self.sha256, str) and len(self.sha256) == 64 and isinstance(self.turned, bool)


def looked_at(root: Path, paths: Sequence[Path], look: Callable[[Path], Looked], threads: int) -> list[Looked]:
    """Returns what `look` says of each file, from the cache where the file is as it was.

    Args:
        root: names the cache.
        paths: files.
        look: reads a file; called in several threads.
        threads: how many.
    """
    place = cache_folder().parent / "images" / f"{hashlib.sha256(bytes(root.resolve())).hexdigest()[:32]}.json"
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
    """Changes whenever the file does; the time of the last change of its entry cannot be set by a program."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read(place: Path) -> dict[str, tuple[tuple[int, ...], Looked]]:
    try:
        data = json.loads(place.read_bytes())
        if data["version"] != _VERSION or data["check"] != json_sha256(data["files"]):
            return {}
        found = {key: (tuple(state), Looked(*looked)) for key, (state, looked) in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found if all(looked.valid for _, looked in found.values()) else {}


def _write(place: Path, files: dict[str, tuple[tuple[int, ...], Looked]]) -> None:
    """Writes the cache, where that is possible."""
    plain = {key: [list(state), [looked.sha256, looked.turned]] for key, (state, looked) in files.items()}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, json.dumps({"version": _VERSION, "files": plain, "check": json_sha256(plain)}))
    except (OSError, UnavailableError, UnicodeError):  # read-only, full, or a name that is no text
        return
