"""Every write of a run fails once: one line and the right exit code, or the run goes on; then the same artifact."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forks import copied
from record import Campaign
from workshop import Reference, Workshop

ERRORS = (errno.ENOSPC, errno.EACCES, errno.EINTR)
_VARYING = re.compile(r"[0-9a-f]{16,}|\.tmp$")
_MOST_CALLS = 2000


class Injector:
    """Fails the first write, below some folders, of a kind and place that has not failed yet.

    Only calls of Python are seen: a library that writes by itself is replaced as a whole (`safetensors`).

    Args:
        roots: the folders.
        failed: places that have failed before.
        error: the error number.
        log: the file that gets the place that failed, before it does.
    """

    def __init__(self, roots: tuple[Path, ...], failed: frozenset[str], error: int, log: Path) -> None:
        self._roots, self._failed, self._error, self._log = tuple(map(str, roots)), failed, error, log
        self._done = False
        self._opened: dict[int, str] = {}  # files open for writing, by descriptor
        self._os_open = os.open
        self._own = 0  # the process that it was installed in

    def install(self) -> None:
        """Replaces the functions of this process."""
        import safetensors.torch
        from edge_compress.pipeline.score import layer_moments

        self._own = os.getpid()
        for name in ("rename", "replace", "link", "mkdir"):
            setattr(os, name, self._guarded(name, getattr(os, name), -1 if name != "mkdir" else 0))
        for name in ("write", "fsync"):
            setattr(os, name, self._on_descriptor(name, getattr(os, name)))
        os.open, os.close = self._opening(os.open), self._closing(os.close)  # type: ignore[assignment]
        builtins.open = io.open = self._buffered(builtins.open)  # type: ignore[assignment]
        save = self._guarded("save_file", safetensors.torch.save_file, 1)
        safetensors.torch.save_file = layer_moments.save_file = save  # type: ignore[attr-defined]

    def _try(self, kind: str, path: object) -> None:
        """Raises the error if it is this write's turn."""
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if self._done or os.getpid() != self._own or not str(text).startswith(self._roots):
            return
        root = next(root for root in self._roots if str(text).startswith(root))
        place = f"{kind} {_VARYING.sub('', os.path.relpath(text, root))}"
        if place in self._failed:
            return
        self._done = True
        descriptor = self._os_open(self._log, os.O_CREAT | os.O_WRONLY)
        with suppress(OSError):
            _write(descriptor, place.encode())
        raise OSError(self._error, os.strerror(self._error), str(text))

    def _guarded(self, kind: str, call: Callable[..., Any], at: int) -> Callable[..., Any]:
        def guarded(*given: Any, **more: Any) -> Any:
            self._try(kind, given[at])
            return call(*given, **more)

        return guarded

    def _opening(self, call: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            if writes:
                self._try("open", path)
            descriptor = call(path, flags, *more, **named)
            if isinstance(path, str | os.PathLike):  # a folder is opened for reading, and synchronised
                self._opened[descriptor] = os.fspath(path)
            return descriptor

        return opened

    def _closing(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def closed(descriptor: int) -> None:
            self._opened.pop(descriptor, None)
            call(descriptor)

        return closed

    def _on_descriptor(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(descriptor: int, *more: Any) -> Any:
            self._try(kind, self._opened.get(descriptor, ""))
            return call(descriptor, *more)

        return guarded

    def _buffered(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if not set(mode) & set("wax+"):
                return call(file, mode, *more, **named)
            self._try("open", file)
            stream = call(file, mode, *more, **named)
            if isinstance(stream, io.TextIOWrapper | io.BufferedWriter):
                return _Stream(stream, lambda: self._try("write", file))
            return stream

        return opened


class _Stream:
    """A file whose writes may fail."""

    def __init__(self, stream: Any, guard: Callable[[], None]) -> None:
        self._stream, self._guard = stream, guard

    def write(self, data: Any) -> int:
        self._guard()
        return int(self._stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)


_write = os.write


def fail_writes(shop: Workshop, wanted: Reference, errors: Sequence[int], found: Campaign) -> None:
    """One call after another in one folder: each fails at the first place that has not failed yet, the next goes on from there.

    The errors take turns. Where a call survives its failed write, it has to end as the uninterrupted run; the folder is put
    back then.
    """
    failed = set[str]()
    folder, cache, kept, log = (shop.folder / "faults" / part for part in ("run", "cache", "kept", "place"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_MOST_CALLS):
        if found.over:
            found.saw("not reached: the time was over")
            break
        log.unlink(missing_ok=True)
        shutil.rmtree(kept, ignore_errors=True)
        for part in (folder, cache):
            if part.exists():
                shutil.copytree(part, kept / part.name)
        error = errors[len(failed) % len(errors)]
        name = errno.errorcode[error]
        injector = Injector((folder, cache), frozenset(failed), error, log)
        ended = shop.run("demo", folder, cache=cache, before=injector.install)
        place = log.read_text() if log.exists() else ""
        if not place:  # every write has failed once, and this run had none left
            wrong = shop.difference("demo", ended, folder, wanted)
            if wrong:
                found.violation("the run after all faults", wrong)
            else:
                found.saw("all places failed once; the run ended with the same artifact")
            break
        failed.add(place)
        if ended.code in (2, 3) and not ended.fault(run=True):
            found.saw(f"{name}: exit code {ended.code}, one line")
        elif ended.code == wanted.code:
            if wrong := shop.difference("demo", ended, folder, wanted):
                found.violation(f"{name}, the run went on", f"{wrong}; at {place}")
            else:
                found.saw(f"{name}: the run went on to the same artifact")
            for part in (folder, cache):
                if (kept / part.name).exists():
                    copied(kept / part.name, part)
                else:
                    shutil.rmtree(part, ignore_errors=True)
        else:
            found.violation(f"{name}, {ended.fault(run=True) or f'exit code {ended.code}'}", f"{ended.last_line}; at {place}")
    if not failed:
        found.violation("no write failed", "the injector sees none")
