"""Targets are found by their file names, without being imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from edge_compress import targets
from edge_compress.pipeline.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of targets/."""
    monkeypatch.setattr(targets, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(targets, "__path__", [str(tmp_path)])
    (tmp_path / "__init__.py").write_text("TARGET = 0\n")
    return tmp_path


def test_a_module_that_binds_target_is_found_and_others_are_not(folder: Path) -> None:
    (folder / "plain.py").write_text("import os\n\nTARGET = object()\n")
    (folder / "typed.py").write_text("TARGET: Target = Typed()\n")
    (folder / "absent_packages.py").write_text("import no_such_package\nTARGET = 1\n")
    (folder / "base.py").write_text("TARGET = 1\n")
    (folder / "helper.py").write_text("def f():\n    TARGET = 1\n    return TARGET\n")
    (folder / "compares.py").write_text("TARGET == 1\nTARGETS = ()\n")
    (folder / "only_annotates.py").write_text("TARGET: Target\nx = 1\n")
    assert targets.names() == ("absent_packages", "plain", "typed")


def test_listing_imports_nothing(folder: Path) -> None:
    (folder / "explodes.py").write_text("raise SystemExit(9)\nTARGET = 1\n")
    assert targets.names() == ("explodes",)
    assert "edge_compress.targets.explodes" not in sys.modules


def test_load_gives_what_the_module_binds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "planted_target.py").write_text("TARGET = ('planted', __name__)\n")
    loaded = targets.load("planted_target")
    monkeypatch.delitem(sys.modules, "edge_compress.targets.planted_target")
    monkeypatch.delattr(targets, "planted_target")
    assert loaded == ("planted", "edge_compress.targets.planted_target")


@pytest.mark.parametrize("name", ["arm", "base", "__init__", "../x86", ""])
def test_an_unknown_name_is_refused_with_the_names_there_are(folder: Path, name: str) -> None:
    (folder / "one.py").write_text("TARGET = 1\n")
    (folder / "two.py").write_text("TARGET = 1\n")
    with pytest.raises(InputError, match="expected one or two"):
        targets.load(name)


def test_what_is_installed_carries_its_file_name() -> None:
    for name in targets.names():
        assert targets.load(name).name == name


@pytest.mark.parametrize(
    ("given", "said"), [("X86", "did you mean x86"), ("fone", "did you mean phone"), ("x86,phone", "once for each")]
)
def test_a_near_miss_is_told_what_was_meant(given: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        targets.check(given)
