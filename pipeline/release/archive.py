"""Packs and reads reproducible .tar.gz archives: the same bytes for the same files, and every change is detected.

    gzip header    constant but for an extra field: the SHA-256 of all that follows
    deflate        a ustar archive: plain files below one folder, sorted by name, mode 644, no times, no owners
    gzip trailer   CRC-32 and length

Any gzip and tar read it. The digest finds damage, also where the files come out whole; who made the archive is a matter of its
signature. Archives from outside are read within limits, and only what `pack` itself could have written is taken.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, VerifyError
from ..files import PLAIN_PATH, read_regular

Tar = mmap.mmap | bytes
MAX_ARCHIVE_BYTES = 2 << 30
MAX_UNPACKED_BYTES = 4 << 30
MAX_RATIO = 100  # unpacked to packed; weights do not reach 10
MAX_FILES = 1000
MOST_NAME = 100  # characters of a file's name without its folders, in a ustar archive

_FIXED = bytes.fromhex("1f8b0804 00000000 02ff 2400 4543 2000")  # deflate, an extra field, no time; its field "EC" of 32 bytes
_BODY = len(_FIXED) + hashlib.sha256().digest_size
_BLOCK = 512
_END = bytes(2 * _BLOCK)
_CHUNK = 1 << 20
_SLACK = 1 << 20  # what may be unpacked of an archive however small
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
}


@dataclass(frozen=True)
class Archive:
    """The files of an archive."""

    folder: str  # that holds all files
    files: Mapping[str, bytes]  # by path below the folder


class _Members(Mapping[str, bytes]):
    """Files of a tar archive, each copied out of it when it is asked for: the archive itself stays on disk."""

    def __init__(self, tar: Tar, places: Mapping[str, slice]) -> None:
        self._tar, self._places = tar, places

    def __getitem__(self, name: str) -> bytes:
        return bytes(self._tar[self._places[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class DamagedArchive(VerifyError):
    """An archive that changed after it was written. `files` is what can still be read of it, to say what is affected."""

    def __init__(self, name: str, found: str, files: Mapping[str, bytes]) -> None:
        super().__init__(f"{name} is damaged", found=found, do="fetch it again")
        self.files = files


def pack(archive: Archive) -> bytes:
    """The archive's bytes.

    Raises:
        VerifyError: a name that an archive may not have.
    """
    for name in (archive.folder, *archive.files):
        if complaint := _complaint(name):
            raise VerifyError(f"{name!r} cannot be in a bundle", found=complaint, expected="a name that a run gives its files")
    engine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    crc, size, packed = 0, 0, []
    for part in _tar(archive):
        crc, size = zlib.crc32(part, crc), size + len(part)
        packed.append(engine.compress(part))
    body = b"".join([*packed, engine.flush(), struct.pack("<II", crc, size & 0xFFFFFFFF)])
    return _FIXED + hashlib.sha256(body).digest() + body


def read_whole(path: Path) -> bytes:
    """The bytes of an archive's file.

    Raises:
        InputError: the file does not exist.
        VerifyError: it is too large.
    """
    try:
        if path.stat().st_size > MAX_ARCHIVE_BYTES:
            found, expected = f"{path.stat().st_size} bytes", f"at most {MAX_ARCHIVE_BYTES}"
            raise VerifyError(f"{path.name} is refused", found=found, expected=expected)
        return read_regular(path, MAX_ARCHIVE_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read", found=error.strerror or str(error), expected="a bundle (.tar.gz)") from error


def unpack(path: Path, data: bytes | None = None) -> Archive:
    """The files of an archive that `pack` wrote; `data`: its bytes, where they were read before.

    Raises:
        InputError: the file does not exist.
        DamagedArchive: a bit of it has changed, or it was cut short.
        VerifyError: it is foreign or malicious: paths that lead out of it, links, devices, two files of one name,
            sizes that are not so, more data than is reasonable.
    """
    name = path.name
    if data is None:
        data = read_whole(path)
    if data[: len(_FIXED)] != _FIXED:
        raise VerifyError(
            f"{name} is not a bundle", found="another gzip header", expected="an archive written by `edge-compress release`"
        )
    body = memoryview(data)[_BODY:]
    if hashlib.sha256(body).digest() != data[len(_FIXED) : _BODY]:
        raise _damaged(name, body)
    tar, refused = _on_disk(_inflate(name, body))
    if refused is not None:
        raise refused
    archive = _archive(name, tar, dict(_members(name, tar)))
    if not _is_made_of(tar, _tar(archive)):
        raise VerifyError(f"{name} is refused", found="headers or padding that differ from what `edge-compress release` writes")
    return archive


def extract(archive: Archive, into: Path) -> None:
    """Write the files below a folder that holds none of them yet."""
    for name, data in archive.files.items():
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(data)


def _tar(archive: Archive) -> Iterator[bytes]:
    """The tar archive in parts."""
    for name in sorted(archive.files):
        data = archive.files[name]
        info = tarfile.TarInfo(f"{archive.folder}/{name}")
        info.size, info.mode = len(data), 0o644
        try:
            header = info.tobuf(tarfile.USTAR_FORMAT)
        except ValueError as error:
            raise VerifyError(f"{name[:100]!r} cannot be in a bundle", found=str(error), expected="a shorter name") from error
        yield from (header, data, bytes(-len(data) % _BLOCK))
    yield _END


def _on_disk(parts: Iterator[bytes]) -> tuple[Tar, VerifyError | None]:
    """Returns the data in an unnamed temporary file, mapped; and the error that ended them early, if one did."""
    refused = None
    with tempfile.TemporaryFile(prefix="edge-compress-") as file:
        try:
            file.writelines(parts)
        except VerifyError as error:
            refused = error
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b"", refused


def _is_made_of(data: Tar, parts: Iterator[bytes]) -> bool:
    """Returns whether the data are the concatenation of the parts."""
    view, at = memoryview(data), 0
    for part in parts:
        if view[at : at + len(part)] != part:
            return False
        at += len(part)
    return at == len(data)


def _complaint(name: str) -> str | None:
    """Why a file in an archive may not be called this."""
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if ".." in name.split("/"):
        return "a path that leads out of the archive"
    return None if PLAIN_PATH.fullmatch(name) else "a name with other than letters, digits and . _ + -, or a hidden one"


def _inflate(name: str, body: memoryview) -> Iterator[bytes]:
    """The tar archive in parts, never more than the limits allow."""
    engine, rest, at = zlib.decompressobj(-zlib.MAX_WBITS), b"", 0
    left = min(MAX_UNPACKED_BYTES, len(body) * MAX_RATIO + _SLACK)
    crc, size = 0, 0
    while not engine.eof:
        if not rest:
            rest, at = bytes(body[at : at + _CHUNK]), at + _CHUNK
        try:
            part = engine.decompress(rest, _CHUNK)
        except zlib.error as error:
            raise VerifyError(f"{name} is refused", found="compressed data that cannot be unpacked") from error
        rest, crc, size = engine.unconsumed_tail, zlib.crc32(part, crc), size + len(part)
        if size > left:
            raise VerifyError(f"{name} is refused", found=f"more than {left} bytes in {len(body)} packed ones, as in a bomb")
        if not part and not rest and at >= len(body) and not engine.eof:
            raise VerifyError(f"{name} is refused", found="compressed data that are cut short")
        yield part
    trailer = engine.unused_data + bytes(body[at : at + _CHUNK])
    if len(trailer) > 8:
        raise VerifyError(f"{name} is refused", found=f"{len(trailer) - 8} bytes after its end")
    if trailer != struct.pack("<II", crc, size & 0xFFFFFFFF):
        raise VerifyError(f"{name} is refused", found="another checksum or length than its last bytes say")


def _members(name: str, tar: Tar) -> Iterator[tuple[str, slice]]:
    """Path and place of every file, one after the other."""
    at, seen = 0, set[str]()
    while tar[at : at + _BLOCK] != bytes(_BLOCK):
        try:
            info = tarfile.TarInfo.frombuf(tar[at : at + _BLOCK], "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise VerifyError(f"{name} is refused", found=f"a broken file header at byte {at} of the tar archive") from error
        shown = ascii(info.name)
        if info.type != tarfile.REGTYPE:
            raise VerifyError(f"{name} is refused", found=f"{shown}: {_KINDS.get(info.type, 'no plain file')}")
        if complaint := _complaint(info.name):
            raise VerifyError(f"{name} is refused", found=f"{shown}: {complaint}")
        if info.name.casefold() in seen:
            raise VerifyError(f"{name} is refused", found=f"{shown} twice")
        if len(seen) == MAX_FILES:
            raise VerifyError(f"{name} is refused", found=f"more than {MAX_FILES} files")
        start = at + _BLOCK
        if not 0 <= info.size <= len(tar) - start:
            raise VerifyError(
                f"{name} is refused", found=f"{shown}: a size of {info.size} bytes, where {len(tar) - start} are left"
            )
        seen.add(info.name.casefold())
        yield info.name, slice(start, start + info.size)
        at = start + info.size + -info.size % _BLOCK


def _archive(name: str, tar: Tar, members: Mapping[str, slice]) -> Archive:
    folders = {path.partition("/")[0] for path in members}
    if len(folders) != 1 or any("/" not in path for path in members):
        raise VerifyError(f"{name} is refused", found=f"{len(members)} files in {len(folders)} folders", expected="one folder")
    (folder,) = folders
    return Archive(folder, _Members(tar, {path.partition("/")[2]: place for path, place in members.items()}))


def _damaged(name: str, body: memoryview) -> DamagedArchive:
    """What is wrong with an archive whose digest does not hold, as far as it can be read."""
    members = dict[str, slice]()
    tar, refused = _on_disk(_inflate(name, body))
    where = "its files can be unpacked, its bytes are not those that were written" if refused is None else refused.found
    try:
        for path, place in _members(name, tar):
            members[path.partition("/")[2]] = place
    except VerifyError as error:
        where = error.found
    last = f" after {list(members)[-1]}" if members and "unpacked, its" not in where else ""
    return DamagedArchive(name, f"another SHA-256 than its header says; {where}{last}", _Members(tar, members))
