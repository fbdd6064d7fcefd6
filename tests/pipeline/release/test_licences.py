"""Licences that the user adds to a bundle: what they may be called."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.release.archive import MOST_NAME, Archive, pack
from edge_compress.pipeline.release.release import _licences


@pytest.mark.parametrize("name", ["x" * (MOST_NAME + 1), "-", "...", "+-+"])
def test_a_name_that_no_archive_can_have_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name != "...":
        file.write_text("a licence")
    with pytest.raises(InputError, match=f"expected 1 to {MOST_NAME}; rename it"):
        _licences([file])


def test_the_longest_name_fits_into_a_bundle(tmp_path: Path) -> None:
    file = tmp_path / ("x" * MOST_NAME)
    file.write_text("a licence")
    assert pack(Archive("a" * 100, _licences([file])))
