"""The agent's package: one file of Python 3.8 and the standard library, the same bytes from the same sources."""

import ast
import io
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from edge_compress.devices import agent
from edge_compress.devices.agent.board import usable_cpus
from edge_compress.devices.local import HereTransport
from edge_compress.devices.transport.connection import Connection, packed_agent

FOLDER = Path(agent.__file__).parent
SOURCES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py"))


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_is_python_3_8_and_the_standard_library(name):
    tree = ast.parse((FOLDER / name).read_text(), feature_version=(3, 8))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    of_runtimes = {"executorch", "numpy", "onnxruntime", "torch"}
    assert {found.partition(".")[0] for found in imported} - of_runtimes <= set(sys.stdlib_module_names)
    at_the_top = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    assert not at_the_top & of_runtimes  # those only where a model is loaded


def test_nothing_outside_the_package_is_imported():
    for name in SOURCES:
        depth = name.count("/") + 1
        levels = [n.level for n in ast.walk(ast.parse((FOLDER / name).read_text())) if isinstance(n, ast.ImportFrom)]
        assert max(levels, default=0) <= depth, name


def test_the_file_holds_every_source_and_its_bytes_do_not_depend_on_when_they_were_written(tmp_path, monkeypatch):
    data, digest = packed_agent()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {name.partition("/")[2] for name in archive.namelist()} - {""} == set(SOURCES)
    copied = shutil.copytree(FOLDER, tmp_path / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    for number, path in enumerate(copied.rglob("*.py")):
        os.utime(path, (1e9 + number, 1e9 + number))
    monkeypatch.setattr(agent, "__file__", str(copied / "__init__.py"))
    assert packed_agent.__wrapped__() == (data, digest)
    (copied / "board.py").write_text("# another\n")
    assert packed_agent.__wrapped__()[1] != digest


def old_python() -> str | None:
    """A Python 3.8 of this machine."""
    installed = sorted(Path.home().glob(".pyenv/versions/3.8.*/bin/python3.8"))
    return str(installed[-1]) if installed else None


@pytest.mark.skipif(old_python() is None, reason="no Python 3.8 on this machine")
def test_it_runs_in_python_3_8_without_any_package(tmp_path):
    with Connection(HereTransport("old", str(tmp_path)), "old", old_python() or "") as there:
        assert there.hello()["machine"]["python"].startswith("3.8.")
        assert there.put_bytes(b"x" * 10, "a file")[1]
    assert len(list(tmp_path.glob("*.pyz"))) == 1
    assert not list(tmp_path.glob("*.py"))


def cgroups(root: Path, own: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cpus_are_those_that_may_be_used_not_those_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus(tmp_path / "without cgroups") == 8
    version2 = {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}
    assert usable_cpus(cgroups(tmp_path / "2", "0::/a/b\n", version2)) == 3  # two and a half
    version1 = {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert usable_cpus(cgroups(tmp_path / "1", "4:cpu,cpuacct:/docker/x\n1:name=systemd:/x\n", version1)) == 2
    free = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert usable_cpus(cgroups(tmp_path / "free", "4:cpu,cpuacct:/docker/x\n", free)) == 8
    assert usable_cpus(cgroups(tmp_path / "little", "0::/\n", {"cpu.max": "1000 100000\n"})) == 1
