"""Files are read again only when they have changed, and a cache that is damaged or cannot be written changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from edge_compress.pipeline.data.file_digests import FileDigest, file_digests
from edge_compress.pipeline.files import sha256_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(bytes([i]) * 100)
    return sorted(folder.iterdir())


def read_again(files: list[Path]) -> list[str]:
    """Names of the files that are read; what is told of all of them is right."""
    seen: list[str] = []

    def look(path: Path) -> FileDigest:
        seen.append(path.name)
        return FileDigest(sha256_file(path), path.name == "3.png")

    found = file_digests(files[0].parent, files, look, 2)
    assert found == [FileDigest(sha256_file(path), path.name == "3.png") for path in files]
    return sorted(seen)


def test_only_what_changed_is_read_again(cache: Path, files: list[Path]) -> None:
    assert len(read_again(files)) == 5
    assert read_again(files) == []
    status = files[2].stat()
    files[2].write_bytes(b"x" * 100)
    os.utime(files[2], ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same size and time
    assert read_again(files) == ["2.png"]
    files[4].unlink()
    assert read_again(files[:4]) == []


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 100_000, None])
def test_a_damaged_cache_is_left_aside(cache: Path, files: list[Path], damage: bytes | None) -> None:
    read_again(files)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes().replace(b"false", b"true", 1) if damage is None else damage)
    assert len(read_again(files)) == 5


def test_a_cache_that_cannot_be_written_changes_nothing(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_bytes(b"a file")
    monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "taken"))
    assert len(read_again(files)) == 5
    assert len(read_again(files)) == 5
