"""Writes files atomically, digests them, and reports a full disk as such."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import UnavailableError, says_full
from .types import FileRef

# of files in run folders and bundles: parts of letters, digits and . _ + -, none hidden
PLAIN_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
_SCRATCH = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # what `atomic_write` writes to


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_ref(path: Path, base: Path) -> FileRef:
    """Returns a reference to a file, its path relative to `base` (the run folder).

    Raises:
        ValueError: the file is not below `base`.
    """
    return FileRef(path.relative_to(base).as_posix(), sha256_file(path), path.stat().st_size)


def read_regular(path: Path, most: int | None = None) -> bytes:
    """Returns the bytes of a regular file, without waiting for a writer where the path is a named pipe.

    Raises:
        OSError: it cannot be opened, is a folder, a pipe, a socket or a device, or has more than `most` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if most is not None and os.fstat(descriptor).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB", str(path))
        return file.read()


def read_referenced(ref: FileRef, base: Path) -> bytes | None:
    """Returns the bytes of a file that a record names; None where it is missing, a link or behind one, or another content."""
    path = base / ref.path
    if has_link(base, ref.path):
        return None
    try:
        data = read_regular(path, ref.size_bytes)
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == ref.sha256 else None


def has_link(base: Path, name: str) -> bool:
    """Whether a path below `base` is a symbolic link or contains one: it may lead out of the folder."""
    parts = Path(name).parts
    return any(base.joinpath(*parts[: end + 1]).is_symlink() for end in range(len(parts)))


def atomic_write(path: Path, data: bytes | str) -> None:
    """Writes a file atomically: to a temporary name in the same folder, fsynced, then renamed.

    Raises:
        OSError: there is a folder, a pipe, a socket or a device under that name, or the folder cannot be written.
        UnavailableError: the disk is full. An existing file is left unchanged.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with disk_errors(path):
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                rest = memoryview(data.encode() if isinstance(data, str) else data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except OSError as error:  # errors on a descriptor carry no file name
                raise OSError(error.errno, error.strerror, str(path)) from error
            finally:
                os.close(descriptor)
            scratch.replace(path)
            _sync_folder(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns "no space left", however a library reports it, into an error that names the file and the free space.

    Raises:
        UnavailableError: the disk that holds `path` is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UnavailableError) or not says_full(error):
            raise
        folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        raise UnavailableError(
            f"the disk is full: {path} could not be written",
            found=f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free",
            do="free some space and re-run the same command; finished stages are kept",
        ) from error


def without_links(path: Path) -> Path:
    """Returns the absolute path that a path leads to; where links lead in a circle, one of them: opening it tells."""
    return Path(os.path.realpath(path))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-links `source` to `target`, or copies it where links are not supported; an existing file is replaced atomically."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with disk_errors(target):
            try:
                scratch.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, scratch)
            scratch.replace(target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def is_scratch(path: Path) -> bool:
    """Tells whether a file is an unfinished one of `atomic_write`."""
    return _SCRATCH.fullmatch(path.name) is not None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
