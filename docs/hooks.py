"""What mkdocs calls while it builds the site (`make docs`).

Pages are plain Markdown that reads well in the repository too. On the way into the site

- commands below `<!-- run -->` are run, and their output is put under them; a command that fails ends the build, unless
  the mark is `<!-- run, whatever the verdict -->` and a gate failed (exit code 1): latencies are those of this machine,
- `<!-- options -->` becomes the table of the options of `edge_compress.compress`,
- the notebooks become pages, with outputs where `make notebooks` has executed them,
- files outside `docs/` that the nav names, or that pages link to, become part of the site.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = ("AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")
PARTS = ("__init__.py", "pipeline", "targets", "calibration", "devices")
EXECUTED = ROOT / "build" / "notebooks"

RUN = re.compile(
    r"^<!-- run(?P<either>, whatever the verdict)? -->\n+```console\n(?P<commands>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"(?P<head>\[(?P<text>[^][]+)\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
COLUMNS = 120
LONGEST_S = 900


def on_config(config: MkDocsConfig) -> None:
    """Lays out the package under its import name, for mkdocstrings: without what else is in the checkout."""
    api = ROOT / "build" / "api" / "edge_compress"
    api.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        link = api / part
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(ROOT / part, api))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside `docs/`, the notebooks, and the files that pages link to."""
    from mkdocs.structure.files import File

    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in sorted((DOCS / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page_of(executed(path))))
    for path in linked_files():
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's Markdown with outputs of commands, with tables of options, and with links as they are in the site."""
    if "<!-- options -->" in markdown:
        markdown = markdown.replace("<!-- options -->", options())
    return relinked(with_outputs(markdown), page.file.src_uri)


def on_post_build(config: MkDocsConfig) -> None:
    """Takes out of the theme's script what it would load from another host when a page is opened from the file system."""
    for script in Path(config.site_dir).glob("assets/javascripts/bundle.*.js"):
        text = script.read_text(encoding="utf-8")
        script.write_text(re.sub(r'"https://[^"]*/iframe-worker/shim"', '"data:text/javascript,"', text), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------- commands


def with_outputs(markdown: str) -> str:
    """The page with what its marked commands print, run one after another in one temporary folder."""
    if not RUN.search(markdown):
        return markdown
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("work", "home", "bin"):
            (folder / part).mkdir()
        (folder / "work" / "examples").symlink_to(ROOT / "examples")
        program = folder / "bin" / "edge-compress"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m edge_compress "$@"\n', encoding="utf-8")
        program.chmod(0o755)

        def ran(match: re.Match[str]) -> str:
            allowed = (0, 1) if match["either"] else (0,)
            return "".join(shown(command, output(command, folder, allowed)) for command in commands(match["commands"])).rstrip()

        return RUN.sub(ran, markdown)


def commands(block: str) -> list[str]:
    """The commands of a block: lines with a dollar sign, and the lines that continue them."""
    return [text.strip().removeprefix("$ ") for text in re.findall(r"^\$ (?:.*\\\n)*.*\n", block, re.MULTILINE)]


def shown(command: str, text: str) -> str:
    """A command and what it printed, as code blocks; a file in a block of its own, for its syntax."""
    if command.startswith("cat ") and (kind := Path(command).suffix[1:]):
        return f"```console\n$ {command}\n```\n\n```{kind}\n{text}```\n\n"
    return f"```console\n$ {command}\n{text}```\n\n"


def output(command: str, folder: Path, allowed: tuple[int, ...] = (0,)) -> str:
    """What a command prints: both streams, as in a terminal of 120 columns, without the folder's path.

    Raises:
        RuntimeError: it ended with an exit code that is not allowed.
    """
    work, home = folder / "work", folder / "home"
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "NO_COLOR": "1", "HOME": str(home)}
    environment |= {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    environment |= {"EDGE_COMPRESS_CACHE": str(home / "cache"), "XDG_CONFIG_HOME": str(home / ".config")}
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    if done.returncode not in allowed:
        raise RuntimeError(f"`{command}` in a page ended with exit code {done.returncode}:\n{done.stdout}")
    lines = done.stdout.replace(f"{work}/", "").replace(str(work), ".").replace(str(home), "~").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def options() -> str:
    """The keyword arguments of `compress`, from the options of the command line."""
    from dataclasses import fields

    from edge_compress.pipeline.cli.main import cli
    from edge_compress.pipeline.config import Config

    named = {param.name: param for param in cli.params}
    rows = ["| argument | |", "|---|---|"]
    for field in fields(Config):
        if field.name not in ("targets", "recipe", "out", "json"):
            text = " ".join(str(getattr(named[field.name], "help", "")).split()).replace("|", "\\|")
            rows.append(f"| `{field.name}` | {text} |")
    return "\n".join(rows)


# ------------------------------------------------------------------------------------------------------------------ notebooks


def executed(path: Path) -> dict[str, Any]:
    """A notebook; with outputs where `make notebooks` has executed the same cells."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    copy = EXECUTED / path.name
    if not copy.is_file():
        return found
    other: dict[str, Any] = json.loads(copy.read_text(encoding="utf-8"))
    same = [_source(cell) for cell in other["cells"]] == [_source(cell) for cell in found["cells"]]
    return other if same else found


def page_of(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: code, and what it printed."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    if cell["cell_type"] == "markdown":
        yield _source(cell)
        return
    yield f"```python\n{_source(cell)}\n```"
    text = ""
    for found in cell["outputs"]:
        data = found.get("data", {})
        text += _joined(found.get("text", data.get("text/plain", "")))
    if text.strip():
        yield f"```text\n{text.rstrip()}\n```"


def _source(cell: dict[str, Any]) -> str:
    return _joined(cell["source"])


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


# ---------------------------------------------------------------------------------------------------------------------- links


def place(path: Path) -> str | None:
    """Where a file of the checkout is in the site; None where it is not part of it."""
    if not path.is_relative_to(ROOT) or not path.is_file():
        return None
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if path == ROOT / "README.md":
        return "index.md"
    name = path.relative_to(ROOT).as_posix()
    return name if name in OUTSIDE or name.startswith("benchmarks/results/") else None


def source_of(uri: str) -> Path:
    """The file of the checkout that a page of the site is made of."""
    return ROOT / uri if uri in OUTSIDE else DOCS / uri


def relinked(markdown: str, uri: str) -> str:
    """The page with links between files of the checkout made links of the site; those to other files become their names."""

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:") or target.endswith(".ipynb"):
            return match[0]
        path = (source_of(uri).parent / target).resolve()
        if path.is_relative_to(DOCS) and source_of(uri).is_relative_to(DOCS):
            return match[0]
        if (there := place(path)) is None:
            return f"{match['text']} (`{path.relative_to(ROOT).as_posix()}`)"
        return f"{match['head']}{posixpath.relpath(there, posixpath.dirname(uri) or '.')}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)


def linked_files() -> list[Path]:
    """The files outside `docs/` that are no pages and that pages link to: results of the benchmarks."""
    found = set()
    for page in (*DOCS.glob("*.md"), *(ROOT / name for name in OUTSIDE)):
        for match in LINK.finditer(page.read_text(encoding="utf-8")):
            path = (page.parent / match["target"]).resolve()
            name = place(path)
            if name is not None and name not in OUTSIDE and not path.is_relative_to(DOCS) and path != ROOT / "README.md":
                found.add(path)
    return sorted(found)
