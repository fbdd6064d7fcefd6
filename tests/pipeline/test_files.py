"""Only regular files are read and written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from edge_compress.devices import board
from edge_compress.pipeline import config
from edge_compress.pipeline.errors import EdgeCompressError
from edge_compress.pipeline.files import atomic_write, read_regular, without_links
from edge_compress.pipeline.release import archive, signing
from edge_compress.pipeline.report.report import read_report
from edge_compress.targets.base import artifact_bytes


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_pipe_is_neither_waited_for_nor_replaced(pipe: Path) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        atomic_write(pipe, "text")
    assert pipe.is_fifo()
    assert list(pipe.parent.iterdir()) == [pipe]


@pytest.mark.parametrize("place", ["/dev/full", "/dev", "link"])
def test_devices_folders_and_links_to_them_are_not_replaced(place: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(OSError, match="not a regular file"):
        atomic_write(tmp_path / place, "text")


@pytest.mark.parametrize(
    "reading",
    [
        lambda path: config.load(path, {}),
        read_report,
        archive.unpack,
        lambda path: signing.signer(path, str),
        lambda path: board.load(str(path)),
        artifact_bytes,
    ],
    ids=["config", "report", "bundle", "key", "board", "artifact"],
)
@pytest.mark.timeout(20)
def test_no_reader_waits_for_a_pipe(reading: Callable[[Path], object], pipe: Path) -> None:
    file = pipe.rename(pipe.with_name("pipe.toml"))
    with pytest.raises(EdgeCompressError, match=r"not a regular file|no such file"):
        reading(file)


def test_links_in_a_circle_have_a_path_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert without_links(tmp_path / "one").parent == tmp_path


def test_a_write_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(descriptor: int, data: object) -> int:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "write", too_large)
    with pytest.raises(OSError, match=r"File too large.*report\.md"):
        atomic_write(tmp_path / "report.md", "text")
    assert list(tmp_path.iterdir()) == []
