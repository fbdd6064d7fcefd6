"""The user's code runs with its folder on the import path, which is as it was afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_compress.pipeline.data.user_code import code_digest, importable, user_factory


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


def test_the_digest_of_code_covers_the_file_and_what_it_imports_beside_it(tmp_path: Path) -> None:
    (tmp_path / "net_with_parts.py").write_text("import parts_of_it\ndef factory(): return parts_of_it.made()\n")
    (tmp_path / "parts_of_it.py").write_text("def made(): return 1\n")
    (tmp_path / "not_imported.py").write_text("x = 1\n")

    def digest() -> str:
        for name in [n for n in sys.modules if n == "parts_of_it"]:
            del sys.modules[name]
        return code_digest(user_factory(f"{tmp_path}/net_with_parts.py:factory", "model").module)

    first = digest()
    assert digest() == first
    (tmp_path / "not_imported.py").write_text("x = 2\n")
    assert digest() == first
    (tmp_path / "net_with_parts.py").write_text("import parts_of_it\ndef factory(): return -parts_of_it.made()\n")
    second = digest()
    assert second != first
    (tmp_path / "parts_of_it.py").write_text("def made(): return 2\n")
    assert digest() not in (first, second)
