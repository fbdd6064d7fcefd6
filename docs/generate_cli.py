"""Writes docs/cli.md, the reference of the command line, from the command line itself: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
from edge_compress.pipeline.cli.main import cli

PAGE = Path(__file__).with_name("cli.md")


def render() -> str:
    """The page: the help of the program and of each command, 120 columns wide."""
    parts = ["# The command line", "", "Made by `make docs` from the program's own help.", ""]
    for name, text in _helps("edge-compress", cli, None):
        parts += [f"## `{name}`", "", "```text", text, "```", ""]
    return "\n".join(parts)


def _helps(name: str, command: click.Command, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    info_name = name.rpartition(" ")[2]
    context = click.Context(command, parent, info_name, terminal_width=120, color=False, **command.context_settings)
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None, child
            yield from _helps(f"{name} {child}", found, context)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
