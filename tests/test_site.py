"""The documentation site and the notebooks: complete, without stored outputs, and executed. The build itself is `make docs`."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from edge_compress.pipeline.cli.main import cli
from edge_compress.pipeline.config import Config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
NEEDED = [name for name in ("nbclient", "nbformat", "ipykernel") if importlib.util.find_spec(name) is None]
ABSENT = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return _module("hooks")


def _named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [name for part in parts for name in _named(part)]


def test_the_site_has_every_page_once(hooks: ModuleType) -> None:
    named = _named(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.glob("**/*.md")}
    there |= {*hooks.OUTSIDE, *(f"notebooks/{path.stem}.md" for path in NOTEBOOKS)}
    assert len(named) == len(set(named))
    assert set(named) == there


def test_links_out_of_the_docs_lead_to_their_place_in_the_site(hooks: ModuleType) -> None:
    assert hooks.relinked("[a](../benchmarks/README.md#x)", "algorithm.md") == "[a](benchmarks/README.md#x)"
    assert hooks.relinked("[a](docs/ci.md)", "AGENTS.md") == "[a](ci.md)"
    assert hooks.relinked("[a](../docs/ci.md)", "benchmarks/README.md") == "[a](../ci.md)"
    assert hooks.relinked("[a](../Makefile)", "ci.md") == "a (`Makefile`)"
    for same in ("[a](report.md#b)", "[a](https://example.org/x)", "[a][b]"):
        assert hooks.relinked(same, "ci.md") == same
    assert {path.suffix for path in hooks.linked_files()} >= {".json"}


def test_marked_commands_are_run_and_shown_with_what_they_print(hooks: ModuleType) -> None:
    page = "a\n\n<!-- run -->\n\n```console\n$ edge-compress init work\n$ ls \\\n    work\n```\n\nb\n"
    shown = hooks.with_outputs(page)
    assert shown.startswith("a\n\n```console\n$ edge-compress init work\n")
    assert hooks.shown("cat a.toml", "b = 1\n") == "```console\n$ cat a.toml\n```\n\n```toml\nb = 1\n```\n\n"
    assert "```console\n$ ls \\\n    work\nedge-compress.toml\nrecipe.py\n```\n\nb\n" in shown
    assert "/tmp" not in shown
    with pytest.raises(RuntimeError, match="exit code 2"):
        hooks.with_outputs("<!-- run, whatever the verdict -->\n\n```console\n$ edge-compress --no-such-option\n```\n")
    failing = "\n\n```console\n$ echo no; exit 1\n```\n"
    with pytest.raises(RuntimeError, match="exit code 1"):
        hooks.with_outputs(f"<!-- run -->{failing}")
    assert "no\n```" in hooks.with_outputs(f"<!-- run, whatever the verdict -->{failing}")


def test_every_mark_is_above_commands(hooks: ModuleType) -> None:
    pages = [path.read_text(encoding="utf-8") for path in DOCS.glob("**/*.md")]
    assert sum(page.count("<!-- run") for page in pages) == sum(len(hooks.RUN.findall(page)) for page in pages) > 2
    assert all(hooks.commands(match["commands"]) for page in pages for match in hooks.RUN.finditer(page))


def test_the_table_of_options_has_all_that_compress_takes(hooks: ModuleType) -> None:
    table = hooks.options()
    for name in {field.name for field in fields(Config)} - {"targets", "recipe", "out", "json"}:
        assert re.search(rf"^\| `{name}` \| \w", table, re.MULTILINE), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_short_and_stored_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    assert 3 <= len(cells) <= 10
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
    known = {field.name for field in fields(Config)} | {"target"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "compress":
                    assert {keyword.arg for keyword in node.keywords} <= known
        else:
            assert all(len(line) <= 121 for line in cell["source"])


def test_a_page_of_a_notebook_shows_what_was_executed(hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (path for path in NOTEBOOKS if path.stem == "first")
    monkeypatch.setattr(hooks, "EXECUTED", tmp_path)
    assert "```text" not in hooks.page_of(hooks.executed(path))
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["42\n", "43\n"]}]
    (tmp_path / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    assert "```text\n42\n43\n```" in hooks.page_of(hooks.executed(path))
    code["source"] = ["changed"]
    (tmp_path / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    assert "```text" not in hooks.page_of(hooks.executed(path))  # outputs of other cells are not shown


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(NEEDED), reason=f"{' and '.join(NEEDED)} not installed: pip install '.[docs]'")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    out = tmp_path / "executed.ipynb"
    # in a process of its own: nbclient's event loop warns, and warnings are errors here
    code = "import sys; from pathlib import Path; from execute_notebooks import execute; execute(*map(Path, sys.argv[1:]))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(DOCS)!r}); {code}", str(path), str(out), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in json.loads(out.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    printed = ["".join("".join(found.get("text", "")) for found in cell["outputs"]) for cell in cells]
    assert any(printed)
    for text in printed:  # progress: lines that end, no control characters, and not hundreds of them
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
        assert len(text.splitlines()) < 150


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(bool(ABSENT), reason=f"{' and '.join(ABSENT)} not installed: pip install '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("index.html", "python.html", "cli.html", "notebooks/first.html", "benchmarks/index.html"):
        assert (tmp_path / name).is_file(), name
    page = (tmp_path / "python.html").read_text(encoding="utf-8")
    assert all(f"edge_compress.{name}" in page for name in ("pipeline.cli.api.compress", "pipeline.task.recipe.Recipe"))
    scripts = list(tmp_path.glob("assets/javascripts/bundle.*.js"))
    assert scripts
    assert not any("iframe-worker" in script.read_text(encoding="utf-8") for script in scripts)
    for file in tmp_path.rglob("*.html"):  # nothing is fetched from another host
        text = file.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?http|<link[^>]+rel=\"?stylesheet[^>]+http", text), file


def test_the_gate_of_the_action_is_a_command_that_exists() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    inputs, (install, compare) = action["inputs"], action["runs"]["steps"]
    assert action["runs"]["using"] == "composite"
    assert {name for name, value in inputs.items() if value.get("required")} == {"run", "against"}
    used = re.findall(r"inputs\.([a-z]+)", json.dumps([install, compare]))
    assert set(used) == set(inputs)
    assert "${{" not in install["run"] + compare["run"]  # values reach the shell as variables: none can be code
    options = {name for param in cli.commands["verify"].params for name in param.opts}
    assert set(re.findall(r"--[a-z-]+", compare["run"])) <= options
    assert (ROOT / "constraints.txt").is_file()


@pytest.mark.parametrize("given", [{}, {"DATA": "npz:set one.npz", "DEVICE": "local", "RECIPE": "a b.py"}])
def test_the_script_of_the_action_passes_its_inputs_on(given: dict[str, str], tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 1\n')
    stand_in.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stand_in), "RUN": "runs/a b", "AGAINST": "old.json"}
    environment |= {"DATA": "", "DEVICE": "", "RECIPE": "", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"), **given}
    script = action["runs"]["steps"][1]["run"]
    done = subprocess.run(["bash", "-e", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1  # of the program, not of tee
    passed_on = (tmp_path / "summary.md").read_text().splitlines()
    assert passed_on[:5] == ["-m", "edge_compress", "verify", "runs/a b", "--against"]
    assert set(passed_on[6:]) == {part for name, value in given.items() for part in (f"--{name.lower()}", value)}
