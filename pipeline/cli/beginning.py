"""The command `init`: a commented configuration file, and a recipe to fill in. Imports only what `--help` needs."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from .. import config as settings
from ..errors import InputError
from .output import echo
from .recipe_draft import draft

CONFIG, RECIPE = "edge-compress.toml", "recipe.py"
_OURS = ("config", "json", "quiet", "verbose", "dry_run", "version", "help")  # of a call, not of a run


@click.command("init")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path())
@click.option("--target", "targets", multiple=True, metavar="NAME", help="Runtime to build for; repeatable.  [default: x86]")
@click.option("--model", metavar="SPEC", help="As for a run; without it a recipe is written.  [default: none]")
@click.option("--weights", metavar="FILE", help="As for a run.  [default: none]")
@click.option("--data", metavar="SPEC", help="As for a run.  [default: none]")
@click.option(
    "--recipe",
    "as_recipe",
    is_flag=True,
    help="Write a recipe with the model and data filled in, for another task, loss or metric.  [default: only without --model]",
)
@click.pass_context
def init(
    context: click.Context,
    folder: Path,
    targets: tuple[str, ...],
    model: str | None,
    weights: str | None,
    data: str | None,
    as_recipe: bool,
) -> int:
    """Write a commented edge-compress.toml into FOLDER (here by default), and a recipe.py unless --model is given.

    The file has every setting with its meaning and default; what is given here is set, the rest commented out. Nothing that
    exists is written over.

    \b
    Examples:
      edge-compress init --target x86
          edge-compress.toml and recipe.py, then: edge-compress inspect --recipe recipe.py
      edge-compress init work --target phone --model net.py:factory --weights net.pt --data npz:set.npz
          then: edge-compress --config work/edge-compress.toml --dry-run
      edge-compress init work --recipe --model net.py:detector --weights net.pt
          a recipe with this model(); datasets(), loss() and metric() are left to fill in
    """  # noqa: D301
    given: dict[str, object] = {"targets": targets or ("x86",), "model": model, "weights": weights, "data": data}
    there = {name: _seen_from(folder, value) for name, value in given.items() if isinstance(value, str)}
    if model is None and (weights or data) and not as_recipe:
        raise InputError("--weights or --data without --model", expected="a model", do="name it with --model SPEC")
    settings.load(None, given)  # refuses what a run would
    files = {CONFIG: "\n".join(_commented(context, given | there))}
    if model is None or as_recipe:
        files = {
            CONFIG: "\n".join(_commented(context, {"targets": given["targets"], "recipe": RECIPE})),
            RECIPE: draft(RECIPE, folder, there.get("model"), there.get("weights"), there.get("data")),
        }
    for name in files:
        if (folder / name).exists():
            raise InputError(f"{folder / name} exists", do="name another folder, or remove it")
    from ..files import atomic_write

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            atomic_write(folder / name, text)
    except OSError as error:
        raise InputError(f"{folder} cannot be written", found=error.strerror or str(error)) from error
    for name in files:
        echo(str(folder / name))
    if RECIPE in files:
        echo(f"next: fill in {folder / RECIPE}, try it with edge-compress inspect --recipe {folder / RECIPE}")
    echo(f"next: edge-compress --config {folder / CONFIG} --dry-run")
    return 0


def _seen_from(folder: Path, spec: str) -> str:
    """A specification whose path, relative to the current folder, is made relative to another one."""
    scheme, found, rest = spec.partition(":")
    parts = [("", spec, "")]
    if found:
        parts += [(f"{scheme}:", rest, ""), ("", scheme, f":{rest}"), (*_named_set(scheme, rest), "")]
    for before, path, after in parts:
        if path and not Path(path).is_absolute() and Path(path).exists():
            return f"{before}{os.path.relpath(path, folder)}{after}"
    return spec


def _named_set(scheme: str, rest: str) -> tuple[str, str]:
    """What stands before the folder in torchvision:NAME:DIR, and the folder."""
    name, _, path = rest.partition(":")
    return f"{scheme}:{name}:", path


def _commented(context: click.Context, given: dict[str, object]) -> Iterator[str]:
    """The lines of the configuration file: each setting with its help; the given ones set."""
    yield "# Settings of edge-compress; flags take precedence: edge-compress --config edge-compress.toml --seed 1"
    yield "# Paths are relative to this file."
    assert context.parent is not None  # the group has the options of a run
    for option in context.parent.command.params:
        name = option.name or ""
        if not isinstance(option, click.Option) or name in _OURS or name == "file":
            continue
        yield ""
        yield from (f"# {line}" for line in textwrap.wrap(option.help or "", 100))
        key = settings.key(name)
        value = given.get(name)
        if value is None:
            default = getattr(settings.Config, name, None)
            yield f"# {key} = {settings.toml_value(default)}" if default not in (None, ()) else f"# {key} ="
        else:
            yield f"{key} = {settings.toml_value(value)}"
    yield ""
