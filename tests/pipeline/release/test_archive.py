"""Archives: the same bytes for the same files, every flipped bit found, hostile ones refused before they do harm."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from edge_compress.pipeline.errors import InputError, VerifyError
from edge_compress.pipeline.release import archive as module
from edge_compress.pipeline.release.archive import Archive, DamagedArchive, extract, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st

HEADER = bytes.fromhex("1f8b0804 00000000 02ff 2400 4543 2000")
FILES = {"a/model.bin": bytes(range(256)) * 9, "b.txt": b"labels\n", "empty": b""}


def sealed(tar: bytes, after: bytes = b"", crc: int = 0, size: int | None = None) -> bytes:
    """A tar archive compressed as ours are, whatever is in it: its digest holds."""
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    trailer = struct.pack("<II", zlib.crc32(tar) ^ crc, len(tar) if size is None else size)
    return around(engine.compress(tar) + engine.flush() + trailer + after)


def around(body: bytes) -> bytes:
    return HEADER + hashlib.sha256(body).digest() + body


def member(name: str, data: bytes = b"x", **changed: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    for key, value in changed.items():
        setattr(info, key, value)
    try:
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    except ValueError:  # what only other formats can say
        header = info.tobuf(tarfile.GNU_FORMAT)
    return header + data + bytes(-len(data) % 512)


END = bytes(1024)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "x.tar.gz"
        path.write_bytes(data)
        return path

    return write


def test_files_come_back_and_gzip_and_tar_read_them(written: Callable[[bytes], Path], tmp_path: Path) -> None:
    path = written(pack(Archive("bundle", FILES)))
    assert unpack(path) == Archive("bundle", FILES)
    subprocess.run(["gzip", "--test", str(path)], check=True)
    subprocess.run(["tar", "xzf", str(path), "-C", str(tmp_path)], check=True)
    assert {name: (tmp_path / "bundle" / name).read_bytes() for name in FILES} == FILES
    extract(unpack(path), tmp_path / "again")
    assert {name: (tmp_path / "again" / name).read_bytes() for name in FILES} == FILES


name = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,10}", fullmatch=True)
paths = st.lists(name, min_size=1, max_size=3).map("/".join)
contents = st.dictionaries(paths, st.binary(max_size=2000), min_size=1, max_size=8).filter(
    lambda files: len({path.casefold() for path in files}) == len(files)
)


@given(name, contents, st.randoms())
@settings(deadline=None, max_examples=60)
def test_any_files_come_back_and_their_order_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, folder: str, files: dict[str, bytes], rng: random.Random
) -> None:
    packed = pack(Archive(folder, files))
    shuffled = list(files.items())
    rng.shuffle(shuffled)
    assert pack(Archive(folder, dict(shuffled))) == packed
    path = tmp_path_factory.mktemp("any") / "x.tar.gz"
    path.write_bytes(packed)
    assert unpack(path) == Archive(folder, files)


def test_no_clock_no_user_and_no_folder_is_in_it(written: Callable[[bytes], Path]) -> None:
    with tarfile.open(written(pack(Archive("bundle", FILES)))) as tar:
        found = tar.getmembers()
    assert [info.name for info in found] == [f"bundle/{name}" for name in sorted(FILES)]
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in found} == {(0, 0, 0, "", "", 0o644)}


def test_every_single_flipped_bit_is_found(written: Callable[[bytes], Path]) -> None:
    data = pack(Archive("bundle", {"a.txt": b"abc" * 40, "b.bin": bytes(600)}))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(VerifyError) as caught:
            unpack(written(bytes(changed)))
        assert "x.tar.gz" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_change_that_unpacks_to_the_same_files_is_found(written: Callable[[bytes], Path]) -> None:
    data = pack(Archive("bundle", FILES))
    tar = zlib.decompress(data[len(HEADER) + 32 :], -15)
    engine = zlib.compressobj(1, zlib.DEFLATED, -15)  # other bytes, the same files
    body = engine.compress(tar) + engine.flush() + data[-8:]
    with pytest.raises(DamagedArchive, match="are not those that were written") as caught:
        unpack(written(data[: len(HEADER) + 32] + body))
    assert caught.value.files == FILES


@pytest.mark.parametrize("length", [0, 5, 16, 47, 48, 49, 200, -9, -8, -1])
def test_an_archive_cut_short_is_found(length: int, written: Callable[[bytes], Path]) -> None:
    data = pack(Archive("bundle", FILES))
    with pytest.raises(VerifyError):
        unpack(written(data[:length]))


def test_what_follows_its_end_is_found(written: Callable[[bytes], Path]) -> None:
    data = pack(Archive("bundle", FILES))
    with pytest.raises(DamagedArchive):
        unpack(written(data + b"\0"))
    with pytest.raises(DamagedArchive):
        unpack(written(data + data))
    with pytest.raises(VerifyError, match="5 bytes after its end"):
        unpack(written(around(data[len(HEADER) + 32 :] + b"again")))


def test_a_file_that_is_not_there_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        unpack(tmp_path / "x.tar.gz")
    with pytest.raises(InputError, match="cannot be read"):
        unpack(tmp_path)


HOSTILE = {
    "leads out": (member("b/../../etc/passwd"), "leads out of the archive"),
    "leads out at once": (member("../b"), "leads out of the archive"),
    "absolute": (member("/etc/passwd"), "an absolute path"),
    "absolute elsewhere": (member("C:/windows"), "an absolute path"),
    "backslash": (member("b/..\\..\\x"), "other than letters"),
    "control character": (member("b/a\x1b[2J"), "other than letters"),
    "hidden": (member("b/.ssh"), "other than letters"),
    "not ascii": (member("b/model\u202egpj.exe"), "no plain file|broken file header|other than letters"),
    "symbolic link": (member("b/link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a symbolic link"),
    "hard link": (member("b/link", b"", type=tarfile.LNKTYPE, linkname="b/x"), "a hard link"),
    "device": (member("b/null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "a device"),
    "disk": (member("b/sda", b"", type=tarfile.BLKTYPE), "a device"),
    "pipe": (member("b/pipe", b"", type=tarfile.FIFOTYPE), "a pipe"),
    "folder": (member("b/folder", b"", type=tarfile.DIRTYPE), "a folder"),
    "extension": (member("b/pax", b"30 path=/etc/passwd\n", type=tarfile.XHDTYPE), "no plain file"),
    "sparse": (member("b/sparse", b"", type=tarfile.GNUTYPE_SPARSE), "no plain file"),
    "twice": (member("b/x") + member("b/x", b"y"), "twice"),
    "twice on some disks": (member("b/x") + member("b/X", b"y"), "twice"),
    "too large a size": (member("b/x", b"x", size=1 << 40)[:1024], "where 1536 are left"),
    "negative size": (member("b/x", b"x", size=-512), "a size of -512"),
    "another format": (member("b/x").replace(b"ustar\x0000", b"ustar  \0"), "headers or padding|broken file header"),
    "two folders": (member("a/x") + member("b/x"), "2 files in 2 folders"),
    "no folder": (member("x"), "1 files in 1 folders"),
    "nothing": (b"", "0 files in 0 folders"),
    "a link's name": (member("b/x", linkname="y"), "headers or padding"),
    "a time": (member("b/x", mtime=1), "headers or padding"),
    "another owner": (member("b/x", uid=1000, uname="me"), "headers or padding"),
    "set uid": (member("b/x", mode=0o4755), "headers or padding"),
    "unsorted": (member("b/y") + member("b/x"), "headers or padding"),
    "something in the padding": (member("b/x")[:-1] + b"!", "headers or padding"),
    "no header": (b"x" * 512, "a broken file header at byte 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_in_one_line(name: str, written: Callable[[bytes], Path]) -> None:
    tar, words = HOSTILE[name]
    with pytest.raises(VerifyError, match=words) as caught:
        unpack(written(sealed(tar + END)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "a//b", "", ".hidden", "a\nb", "a\\b", 101 * "a", "a b", "é"])
def test_no_archive_is_written_that_would_be_refused(name: str) -> None:
    with pytest.raises(VerifyError, match=r"path|name"):
        pack(Archive("bundle", {name: b""}))


def test_a_bomb_is_refused_before_it_is_unpacked(written: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = zlib.decompressobj

    class Counting:
        def __init__(self, *arguments: int) -> None:
            self.engine = real(*arguments)

        def __getattr__(self, key: str) -> object:
            return getattr(self.engine, key)

        def decompress(self, data: bytes, most: int) -> bytes:
            part = self.engine.decompress(data, most)
            taken.append(len(part))
            return part

    monkeypatch.setattr(module.zlib, "decompressobj", Counting)
    bomb = sealed(member("b/zeros", bytes(300 << 20)) + END)
    assert len(bomb) < 400_000
    with pytest.raises(VerifyError, match="as in a bomb"):
        unpack(written(bomb))
    assert sum(taken) < 50 << 20


def test_there_is_a_limit_to_files_and_to_the_archive_itself(
    written: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = b"".join(member(f"b/{i:05}", b"") for i in range(1001))
    with pytest.raises(VerifyError, match="more than 1000 files"):
        unpack(written(sealed(many + END)))
    path = written(pack(Archive("bundle", FILES)))
    monkeypatch.setattr(module, "MAX_UNPACKED_BYTES", 4096)
    with pytest.raises(VerifyError, match="more than 4096 bytes"):
        unpack(path)
    monkeypatch.setattr(module, "MAX_ARCHIVE_BYTES", path.stat().st_size - 1)
    with pytest.raises(VerifyError, match="expected at most"):
        unpack(path)


def test_lying_lengths_and_checksums_are_refused(written: Callable[[bytes], Path]) -> None:
    tar = member("b/x") + END
    unpack(written(sealed(tar)))
    for data in (sealed(tar, crc=1), sealed(tar, size=len(tar) + 1)):
        with pytest.raises(VerifyError, match="checksum or length"):
            unpack(written(data))
    with pytest.raises(VerifyError, match="cut short"):
        unpack(written(around(sealed(tar)[len(HEADER) + 32 : -30])))
    with pytest.raises(VerifyError, match="cannot be unpacked"):
        unpack(written(around(b"\xff" * 100)))
    with pytest.raises(VerifyError, match="where"):  # the last file's content is not all there
        unpack(written(sealed(member("b/x", b"x" * 2000)[:1024])))


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        extract(Archive("bundle", FILES), tmp_path)
    assert (tmp_path / "b.txt").read_text() == "mine"


def test_unpacking_holds_one_file_at_a_time(tmp_path: Path) -> None:
    files = {f"part{k}": random.Random(k).randbytes(2 << 20) for k in range(8)}
    path = tmp_path / "large.tar.gz"
    path.write_bytes(pack(Archive("large", files)))
    tracemalloc.start()
    found = unpack(path)
    assert all(len(data) == 2 << 20 for data in found.files.values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size + 3 * (2 << 20)
    assert found.files == files
