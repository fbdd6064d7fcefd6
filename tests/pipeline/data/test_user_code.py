"""The user's code runs with its folder on the import path, which is as it was afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.user_code import functions_in, user_factory, users_code
from edge_compress.pipeline.errors import InputError


def test_the_import_path_is_as_before(tmp_path: Path) -> None:
    before = list(sys.path)
    with users_code(tmp_path, "model net.py"):
        assert sys.path == [*before, str(tmp_path)]
    assert sys.path == before


def test_user_code_may_take_its_folder_off_the_import_path_itself(tmp_path: Path) -> None:
    before = list(sys.path)
    with users_code(tmp_path, "model net.py"):
        sys.path.remove(str(tmp_path))
    assert sys.path == before


class Silent(BaseException):
    """An exception of the user's that is no Exception, and whose text cannot be had."""

    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    "error", [Silent(), GeneratorExit(), SystemExit(3), RuntimeError("of mine")], ids=lambda e: type(e).__name__
)
def test_whatever_the_users_code_raises_is_one_line(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused, users_code(tmp_path, "model net.py"):
        raise error
    assert str(refused.value).startswith(f"model net.py: found {type(error).__name__}")


def test_settings_of_pytorch_that_the_users_code_changes_are_restored(tmp_path: Path) -> None:
    before = (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled())
    with users_code(tmp_path, "model net.py"):
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(before[2] + 1)
        torch.set_grad_enabled(False)
    after = (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled())
    assert after == before
    assert torch.zeros(1).device.type == "cpu"


def test_a_standard_stream_that_the_users_code_closes_is_opened_again(tmp_path: Path) -> None:
    body = f"""
import sys
from pathlib import Path
from edge_compress.pipeline.data.user_code import users_code
with users_code(Path({str(tmp_path)!r}), "model net.py"):
    sys.stdout.close()
    sys.stderr.close()
print("out")
print("err", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, where another test has imported it
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


def test_a_helper_edited_between_two_loads_is_imported_again(tmp_path: Path) -> None:
    (tmp_path / "edited_net.py").write_text("from edited_helper import made\ndef factory(): return made()\n")
    for value in (1, 2, 3):  # same size, same second
        (tmp_path / "edited_helper.py").write_text(f"def made(): return {value}\n")
        assert user_factory(f"{tmp_path}/edited_net.py:factory", "model").function() == value


def test_files_in_two_folders_each_import_the_helper_beside_them(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_name_beside.py").write_text(f"WHERE = {name!r}\n")
        (tmp_path / name / "loader.py").write_text("from same_name_beside import WHERE\ndef where(): return WHERE\n")
    found = [user_factory(f"{tmp_path}/{name}/loader.py:where", "data").function() for name in ("one", "other")]
    assert found == ["one", "other"]


def test_the_functions_of_a_file_that_can_be_called_as_they_are_are_listed_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "raise SystemExit(1)\n"
        "def small(): ...\n"
        "def sized(num_classes, width=2): ...\n"
        "def named(*, num_classes): ...\n"
        "def other(depth): ...\n"
        "def _own(): ...\n"
        "class Net:\n    def __init__(self, num_classes=10): ...\n"
        "class Wide:\n    def __init__(self, width): ...\n"
    )
    assert functions_in(str(path), "num_classes") == ("small", "sized", "named", "Net")
    assert functions_in(str(path)) == ("small", "Net")
    path.write_text("def broken(:")
    assert functions_in(str(path)) == ()
    assert functions_in(str(tmp_path / "absent.py")) == ()
