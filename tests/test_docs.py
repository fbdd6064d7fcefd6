"""What the documents say is so: the reference is current, commands and make targets exist, links lead somewhere."""

from __future__ import annotations

import contextlib
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


# what may stand before the program: a prompt, a step of a workflow, variables, the program's folder, a container
BEFORE = re.compile(r"^(?:\$ |- run: )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/|docker run .* (?=edge-compress(?:-cuda)? --))?")


def _blocks(page: Path) -> list[str]:
    """A page's code blocks, those inside lists too."""
    return re.findall(r"^ *```[^\n`]*\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> list[str]:
    """The `edge-compress ...` lines of a page's code blocks, continuation lines joined, without redirections."""
    lines = (line.strip() for block in _blocks(page) for line in block.replace("\\\n", " ").splitlines())
    found = (BEFORE.sub("", line).replace("edge-compress-cuda ", "edge-compress ") for line in lines)
    return [re.split(r" (?:>>?|\||&&) ", line)[0] for line in found if line.startswith("edge-compress ")]


def _spans(page: Path) -> list[str]:
    """What a page sets in code within its sentences and tables, on one line each."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Raises click.UsageError for what the program would not take; nothing is run."""

    def disarm(command: click.Command) -> None:
        monkeypatch.setattr(command, "callback", lambda *_, **__: None)
        for child in command.commands.values() if isinstance(command, click.Group) else ():
            disarm(child)

    disarm(cli)

    def parsed(arguments: list[str]) -> None:
        with contextlib.suppress(click.exceptions.Exit):  # --version, --help
            cli.invoke(cli.make_context("edge-compress", arguments))

    return parsed


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_in_code_blocks_are_taken_by_the_program(page: Path, parse: Callable[[list[str]], None]) -> None:
    for line in _commands(page):
        parse(shlex.split(line, comments=True)[1:])


def _options(command: click.Command) -> set[str]:
    """All options of a command and of those below it."""
    found = {name for param in command.params if isinstance(param, click.Option) for name in (*param.opts, *param.secondary_opts)}
    return found.union(*(_options(child) for child in command.commands.values())) if isinstance(command, click.Group) else found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_in_sentences_have_commands_and_options_that_exist(page: Path) -> None:
    """They have placeholders and dots, so that they cannot be parsed as they stand."""
    for span in _spans(page):
        if span.startswith("edge-compress "):
            name, *words = span.split()[1:]
            command = cli.commands.get(name, cli)
            assert command is not cli or name.startswith("-"), span
            used = {word for word in (name, *words) if word.startswith("--")}
            assert used <= _options(command) | {"--help", "--version"}, span


OF_OTHERS = {  # options in our pages that are not ours
    *("--no-deps", "--target", "--index-url", "--extra-index-url", "--prefix"),  # pip and npm
    *("--resources", "--time", "--check", "--against", "--gpus", "--int8", "--fp16", "--cpuset-cpus", "--strict"),
}


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name == "docs"], ids=lambda p: p.name)
def test_options_in_sentences_exist(page: Path) -> None:
    known = _options(cli) | OF_OTHERS | {"--help"}
    named = {word for span in _spans(page) if span.startswith("--") for word in span.split() if word.startswith("--")}
    assert named <= known


def test_no_command_of_a_page_is_left_out() -> None:
    """Every line of a code block that names the program at the place of a command is one of those that are tried."""
    for page in PAGES:
        lines = [line for block in _blocks(page) for line in block.replace("\\\n", " ").splitlines()]
        named = [
            line for line in lines if re.search(r"(?:^|[\s/])edge-compress(?:-cuda)? (?:-|[a-z])", re.sub(r"(^|\s)#.*", "", line))
        ]
        named = [line for line in named if "docker build" not in line]
        if page.name != "cli.md":  # help texts: their examples are tried below
            assert len(_commands(page)) == len(named), page


def test_examples_in_help_texts_are_taken_by_the_program(parse: Callable[[list[str]], None]) -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").replace("\\\n", " ")
    examples = re.findall(r"^ {4}(edge-compress .*)$", text, re.MULTILINE)
    assert len(examples) > 10
    for line in examples:
        parse(shlex.split(line)[1:])


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


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_the_image_is_made_of_files_and_extras_that_exist(name: str, parse: Callable[[list[str]], None]) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    steps = re.findall(r"^([A-Z]+) (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    assert {step for step, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "ENTRYPOINT", "CMD"}
    assert next(step for step, _ in steps if step != "ARG") == "FROM"
    sources = [source for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for source in line.split()[:-1]]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not set(ignored) & set(sources)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    assert set(packages.values()) - {"."} <= set(sources)
    assert [value for step, value in steps if step == "USER"] == ["user"]
    assert [value for step, value in steps if step == "ENTRYPOINT"] == ['["edge-compress"]']
    assert "-c constraints.txt" in text
    for line in re.findall(r"^# +docker run .* edge-compress(?:-cuda)? (--.*)$", text, re.MULTILINE):
        parse(shlex.split(line))
    (extras,) = re.findall(r"'\.\[([a-z,-]+)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
