"""The user's code runs with its folder on the import path, which is as it was afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_compress.pipeline.data.user_code import importable


def test_the_import_path_is_as_before(tmp_path: Path) -> None:
    before = list(sys.path)
    with importable(tmp_path):
        assert sys.path == [*before, str(tmp_path)]
    assert sys.path == before


def test_user_code_may_take_its_folder_off_the_import_path_itself(tmp_path: Path) -> None:
    before = list(sys.path)
    with importable(tmp_path):
        sys.path.remove(str(tmp_path))
    assert sys.path == before
