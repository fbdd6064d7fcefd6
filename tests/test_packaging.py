"""The wheel holds the four folders whole, under one name, and nothing else; imports keep to that name and to the arrows."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "targets", "calibration", "devices")
DATA = (".toml", ".jinja")


ROOT_FILES = ("__init__.py", "__main__.py", "py.typed")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from: a build in the checkout would find what an earlier one left there."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", *ROOT_FILES):
        shutil.copy(ROOT / name, copy)
    for name in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> zipfile.ZipFile:
    code = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    built = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (file,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_module_and_data_file_of_the_four_folders_and_nothing_else(
    tree: Path, wheel: zipfile.ZipFile
) -> None:
    expected = {
        f"edge_compress/{path.relative_to(tree).as_posix()}"
        for folder in FOLDERS
        for path in (tree / folder).rglob("*")
        if path.suffix in (".py", *DATA) or path.name == "py.typed"
    }
    expected |= {f"edge_compress/{name}" for name in ROOT_FILES}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {f"edge_compress/{folder}/py.typed" for folder in FOLDERS} < packed


def test_every_file_of_the_four_folders_has_a_kind_that_is_packed() -> None:
    others = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".py", *DATA) and path.name != "py.typed"
    ]
    assert others == []


def test_no_top_level_name_is_taken_but_one(wheel: zipfile.ZipFile) -> None:
    (names,) = (name for name in wheel.namelist() if name.endswith("/top_level.txt"))
    assert wheel.read(names).decode().split() == ["edge_compress"]
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"edge_compress"}


def test_the_wheel_carries_the_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    (points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "edge-compress = edge_compress.pipeline.cli.main:script" in wheel.read(points).decode()
    (text,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert wheel.read(text) == (ROOT / "LICENSE").read_bytes()


def test_the_source_distribution_builds_the_same_wheel(tree: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """As pip does where it finds no wheel: from the archive alone."""
    code = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, "build_sdist", str(tmp_path)], cwd=tree, capture_output=True, check=True)
    (archive,) = tmp_path.glob("edge_compress-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    subprocess.run([sys.executable, "-c", code, "build_wheel", str(tmp_path)], cwd=unpacked, capture_output=True, check=True)
    (file,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(file).namelist()) == sorted(wheel.namelist())


def test_the_metadata_have_what_an_index_shows(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    found = message_from_bytes(wheel.read(name))
    assert found["Name"] == "edge-compress"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    assert len(found.get_all("Classifier", [])) >= 5
    assert {"phone", "executorch", "release", "timm"} <= set(found.get_all("Provides-Extra", []))


def _sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if "data" not in path.relative_to(ROOT).parts)


def _imported(path: Path) -> Iterator[str]:
    """What a file imports: absolute names as they stand, relative ones as `edge_compress.FOLDER.MODULE`."""
    package = ("edge_compress", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            whole = ".".join((*base, *(node.module or "").split("."))).rstrip(".")
            yield from (f"{whole}.{alias.name}" for alias in node.names)


def test_no_file_imports_a_folder_by_its_bare_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in _sources(*FOLDERS, "tests", "docs", "benchmarks")
        for name in _imported(path)
        if name.partition(".")[0] in FOLDERS
    ]
    assert wrong == []


def test_inside_the_package_imports_are_relative() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in _sources(*FOLDERS)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("edge_compress"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("edge_compress") for alias in node.names))
    ]
    assert wrong == []


MAY_IMPORT = {
    "targets": ("calibration", "pipeline.types", "pipeline.signature", "pipeline.options", "pipeline.errors", "pipeline.files"),
    "calibration": ("pipeline.types", "pipeline.errors"),
    "devices": ("pipeline.types", "pipeline.signature", "pipeline.options", "pipeline.errors"),
}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_the_arrows_between_the_folders_point_one_way(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in _sources(folder)
        for name in _imported(path)
        if name.startswith("edge_compress.")
        and not any(f"{name}.".startswith(f"edge_compress.{allowed}.") for allowed in (folder, *MAY_IMPORT[folder]))
    ]
    assert wrong == []


def test_everything_the_project_needs_is_pinned() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.url is None
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            pins[canonicalize_name(requirement.name)] = specifier.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *(text for extra in extras.values() for text in extra)):
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"platform_machine": "x86_64"}):
            continue
        assert pins.get(canonicalize_name(requirement.name), "none") in requirement.specifier, text


LARGEST_FILE, LARGEST_ROOM, LARGEST_TOP = 350, 10, 12  # lines; files beside a room's `__init__.py`; files with it


def test_rooms_and_files_stay_small_enough_to_read() -> None:
    sources = list(_sources(*FOLDERS))
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {name: n for name, n in lines.items() if n > LARGEST_FILE} == {}
    rooms = Counter(path.parent.relative_to(ROOT).as_posix() for path in sources if path.name != "__init__.py")
    assert rooms.pop("pipeline") < LARGEST_TOP
    assert {room: n for room, n in rooms.items() if n > LARGEST_ROOM} == {}
