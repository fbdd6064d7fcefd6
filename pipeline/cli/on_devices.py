"""The commands `profile` and `devices`. Imports only what `--help` needs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..errors import BuildError, InputError, UnavailableError
from .output import echo

RUNTIMES = {".tflite": "litert", ".pte": "executorch"}  # of files by their suffix; others: the device's


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--device",
    metavar="NAME",
    default="local",
    show_default=True,
    help="A name from `edge-compress devices`, a TOML file, or class:NAME for any free board of that class.",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="COUNT", help="Threads of the runtime.  [default: the device's]")
@click.option(
    "--sessions",
    type=click.IntRange(1, 1000),
    metavar="COUNT",
    default=5,
    show_default=True,
    help="Number of fresh processes to measure in.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Also write profile.json and profile.html to this folder."
)
def profile(models: tuple[Path, ...], device: str, threads: int | None, sessions: int, out: Path | None) -> int:
    """Measure artifacts on a device: latency, memory, time per layer.

    The first artifact is the baseline; the others are measured interleaved with it.

    \b
    Example:
      edge-compress profile dense.onnx pruned.onnx --device local --out profiles/pruned
    """  # noqa: D301
    from ...devices.access import named, require_processors
    from ...devices.measure.timing import TimingSettings
    from .. import progress
    from ..profile import profiling

    board = named(device)[0]
    require_processors(device, threads or board.threads, "--threads" if threads else f"{board.file}: threads")
    for model in models:
        if model.exists() and not model.is_file():
            raise InputError(str(model), found="not a regular file", expected="an artifact's file")
    runtimes = {RUNTIMES.get(model.suffix, board.runtime) for model in models}
    runtime = runtimes.pop() if len(runtimes) == 1 else board.runtime
    timing = TimingSettings(threads=threads or board.threads, affinity=board.affinity, runtime=runtime, sessions=sessions)
    try:
        result = profiling.profile(models, device, timing, progress.Progress())
    except BuildError as error:  # nothing is built here: the file is the user's
        raise InputError(error.what, found=error.found, expected=error.expected, do=error.do) from error
    echo("\n".join(profiling.table(result)))
    if out is not None:
        from ..codec import to_json
        from ..files import atomic_write
        from ..profile.page import to_html

        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "profile.json", json.dumps(to_json(result), indent=1) + "\n")
        atomic_write(out / "profile.html", to_html(result))
        echo(f"profile: {out / 'profile.html'}")
    return 0


@click.group(invoke_without_command=True)
@click.pass_context
def devices(context: click.Context) -> int:
    """List the devices on which latency can be measured; `devices check NAME` checks whether one is ready."""
    from ...devices import board as boards

    if context.invoked_subcommand is None:
        for board in map(boards.load, boards.names()):
            facts = [f"by {board.transport}", board.runtime, f"{board.threads} thread{'s' if board.threads > 1 else ''}"]
            if board.memory_mib:
                facts.append(f"{board.memory_mib / 1024:g} GB")
            if board.precisions:
                facts.append(" ".join(board.precisions))
            if board.class_:
                facts.append(f"class {board.class_}")
            if board.transport != "local" and not board.address:
                facts.append("a template without an address")
            echo(f"{board.name}: {', '.join(board.targets)}; {', '.join(facts)}. {board.notes}".rstrip())
    return 0


@devices.command()
@click.argument("name")
def check(name: str) -> int:
    """Check whether a device is ready, and show its runtime, memory, disk, temperature, clocks and noise floor.

    \b
    Example:
      edge-compress devices check local
    """  # noqa: D301
    from ...devices import board as boards
    from ...devices.access import require_processors
    from ..profile import board_check

    board = boards.load(name)
    require_processors(name, board.threads, f"{board.file}: threads")
    lines, lacking = board_check.check(board)
    echo("\n".join(lines))
    if lacking:
        raise UnavailableError(f"device {board.name} is not ready", found="; ".join(lacking))
    echo(f"device {board.name} is ready for {', '.join(board.targets)}")
    return 0
