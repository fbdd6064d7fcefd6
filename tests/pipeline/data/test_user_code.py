"""The user's code runs with its folder on the import path, which is as it was afterwards."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.user_code import code_digest, user_factory, users_code
from edge_compress.pipeline.errors import InputError


def test_the_import_path_is_as_before(tmp_path: Path) -> None:
    before = list(sys.path)
    with users_code(tmp_path):
        assert sys.path == [*before, str(tmp_path)]
    assert sys.path == before


def test_user_code_may_take_its_folder_off_the_import_path_itself(tmp_path: Path) -> None:
    before = list(sys.path)
    with users_code(tmp_path):
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


def test_code_that_ends_the_process_is_refused_and_its_forked_children_may_end(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("import os\n\ndef make():\n    os._exit(9)\n")
    (tmp_path / "forking.py").write_text(
        "import os\n\ndef make():\n    child = os.fork()\n    if child == 0:\n        os._exit(7)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
    )
    leave = os._exit
    with pytest.raises(InputError, match=r"SystemExit: os\._exit\(9\)"):
        load_data(f"{tmp_path / 'leaving.py'}:make", seed=0)
    with pytest.raises(InputError, match="a int"):  # the child's exit code came back
        load_data(f"{tmp_path / 'forking.py'}:make", seed=0)
    assert os._exit is leave
