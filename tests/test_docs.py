"""What the documents say is so: the reference is current, commands and make targets exist, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import pytest
from edge_compress.pipeline.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")) if p.stat().st_size)


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_reference_is_what_the_program_says() -> None:
    generator = _generator()
    assert generator.PAGE.read_text(encoding="utf-8") == generator.render(), "docs/cli.md is stale: make docs"


def test_the_reference_has_every_command_and_every_option() -> None:
    page = _generator().render()
    for name in cli.commands:
        assert f"## `edge-compress {name}`" in page
    for option in (opt for p in cli.params for opt in p.opts):
        assert option in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def _commands(page: Path) -> list[str]:
    """The `edge-compress ...` lines of a page's code blocks, continuation lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = (line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith("edge-compress ") and not line.startswith("edge-compress: ")]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Raises click.UsageError for what the program would not take; nothing is run."""

    def disarm(command: click.Command) -> None:
        monkeypatch.setattr(command, "callback", lambda *_, **__: None)
        for child in command.commands.values() if isinstance(command, click.Group) else ():
            disarm(child)

    disarm(cli)
    return lambda arguments: cli.invoke(cli.make_context("edge-compress", arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_in_code_blocks_are_taken_by_the_program(page: Path, parse: Callable[[list[str]], None]) -> None:
    for line in _commands(page):
        parse(shlex.split(line, comments=True)[1:])


def test_a_command_with_a_wrong_option_would_be_noticed(parse: Callable[[list[str]], None]) -> None:
    for wrong in ("--no-such-option", "no-such-command", "--score best", "verify", "verify a --no-such-option"):
        with pytest.raises(click.UsageError):
            parse(wrong.split())
    assert any(_commands(page) for page in PAGES)


def test_make_targets_in_the_documents_exist() -> None:
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*PAGES, ROOT / ".ci" / "run"):
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`make ([a-z-]+(?: [a-z-]+)*)`|^(?:\$ )?make ([a-z-]+(?: [a-z-]+)*)$", text, re.MULTILINE)
        assert {target for pair in named for target in " ".join(pair).split()} <= there, page
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert {target for target in there - {"help"} if f"`make {target}`" not in contributing} == set()


def _prose(page: Path) -> list[str]:
    """The lines of a page outside code blocks and tables."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not line.startswith("|")]


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "results"], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_prose_is_wrapped_at_120_columns(page: Path) -> None:
    assert [line for line in _prose(page) if len(line) > 120] == []


def test_files_named_in_contributing_exist() -> None:
    named = set(
        re.findall(r"`((?:pipeline|targets|devices|calibration|tests|docs)/[\w./-]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    )
    assert len(named) > 20
    assert {name for name in named - {"targets/NAME.py"} if not (ROOT / name).exists()} == set()


def test_source_files_named_in_the_documents_exist() -> None:
    for page in PAGES:
        named = re.findall(r"`((?:pipeline|targets|devices|calibration)/[\w/]+\.py)`", page.read_text(encoding="utf-8"))
        assert [name for name in named if name != "targets/NAME.py" and not (ROOT / name).exists()] == [], page


def test_the_image_is_made_of_files_and_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert sources
    assert [name for name in sources if not (ROOT / name).exists()] == []
    (extras,) = re.findall(r"'\.\[([a-z,-]+)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
