"""The command line: options in, one call, exit code out. Nothing here is imported that `--help` does not need."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click

from ... import targets
from .. import config as settings
from .. import options
from ..errors import EdgeCompressError, UnavailableError
from ..types import Pattern, Precision
from .finished_runs import release, report, verify

_DEFAULTS = {field.name: field.default for field in fields(settings.Config)}
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _option(name: str, help: str, default: str = "", **more: Any) -> Decorator:
    """An option that is None when it is not given, so that the file may set it; `default` is what the help says of that."""
    field = more.pop("field", name.removeprefix("--").replace("-", "_"))
    shown = default or str(_DEFAULTS[field])
    return click.option(name, field, default=more.pop("unset", None), help=f"{help}  [default: {shown}]", **more)


def _choice(kind: type[StrEnum], *more: str) -> click.Choice[str]:
    """The values of an enumeration, and other names for some."""
    return click.Choice([*(member.value for member in kind), *more])


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    no_args_is_help=False,
)
@_option(
    "--target",
    f"Runtime to build for: {', '.join(targets.names()) or 'none is installed'}. Repeatable.",
    "none, required here or in the file",
    field="targets",
    metavar="NAME",
    multiple=True,
    unset=(),
)
@_option("--model", "digits-resnet, torchvision:NAME, timm:NAME, FILE.py:FACTORY or package.module:FACTORY.", metavar="SPEC")
@_option(
    "--weights",
    "State dict: .safetensors, or .pt/.pth without pickled code.",
    "none, the model as its factory gives it",
    metavar="FILE",
)
@_option(
    "--data",
    "digits, npz:FILE (train_images uint8 NHWC, train_labels, test_images, test_labels), imagefolder:DIR, "
    "torchvision:NAME:DIR or FILE.py:FACTORY.",
    metavar="SPEC",
)
@_option(
    "--mean", "Channel means of pixels on [0, 1], such as 0.49,0.48,0.45.", "the model's own, else ImageNet's", metavar="NUMBERS"
)
@_option("--std", "Channel standard deviations of the same.", "the model's own, else ImageNet's", metavar="NUMBERS")
@_option(
    "--augment",
    "How training images are varied, as when the model was trained.",
    "shift for digits, else crop-flip",
    type=_choice(options.Augment),
)
@_option("--image-size", "Height and width images are scaled to.", "the model's own, else the data's", type=int, metavar="PIXELS")
@_option(
    "--device", "Where latency is measured: a name from `edge-compress devices`, a TOML file, or class:NAME.", metavar="NAME"
)
@_option(
    "--pattern",
    "What is removed: channels and blocks, single weights, or two of four.",
    "auto, what the target can use",
    type=_choice(Pattern, "auto"),
)
@_option("--precision", "Number format of the artifact.", "the target's best", type=_choice(Precision))
@_option("--float-io", "Float input and output of an int8 .tflite, whose own are int8.", "off", is_flag=True, flag_value=True)
@_option(
    "--latency-budget",
    "What latency may be: a share of the dense float model's (0.5), or milliseconds (8ms).",
    "0.5",
    metavar="BUDGET",
)
@_option("--max-accuracy-drop", "Gate: points of top-1 on the test split that may be lost.", type=float, metavar="POINTS")
@_option(
    "--min-speedup",
    "Gate: the lower end of the speedup's 95 % interval must reach it.",
    type=float,
    metavar="RATIO",
)
@_option(
    "--max-size", "Budget and gate: what the artifact's file may take, such as 98496, 500kB or 1.5MB.", "any", metavar="SIZE"
)
@_option(
    "--reward",
    "What the search maximises: hard, accuracy with the budget as a wall; soft, alpha * accuracy - beta * latency.",
    type=_choice(options.Reward),
)
@_option("--alpha", "Weight of accuracy in the soft reward.", type=float, metavar="NUMBER")
@_option("--beta", "Weight of latency (a share of the dense model's) in the soft reward.", type=float, metavar="NUMBER")
@_option(
    "--lambda", "Weight of curvature in the score, or auto.", "auto, tuned on the search split", field="lambda_", metavar="NUMBER"
)
@_option(
    "--score",
    "What says how much a connection matters; seed is the published formula, sign and all.",
    type=_choice(options.Score, "seed"),
)
@_option("--search", "What sets the thresholds of the layers.", type=_choice(options.SearchMethod))
@_option("--evaluations", "Distinct candidates the search may evaluate.", "200, for digits 100", type=int, metavar="COUNT")
@_option("--finetune-epochs", "Epochs of fine-tuning with distillation.", "15, for digits 12", type=int, metavar="COUNT")
@_option(
    "--mask",
    "In fine-tuning with --pattern weight: fixed, or dynamic, re-chosen after each epoch.",
    type=_choice(options.MaskMode),
)
@_option("--seed", "Same inputs and same seed give the same artifact on the same machine.", type=int, metavar="NUMBER")
@_option("--accelerator", "Where scoring and fine-tuning run.", type=_choice(options.Accelerator))
@_option("--threads", "Threads of the artifact's runtime when it is measured.", type=int, metavar="COUNT")
@_option("--out", "Run folder. The same command on the same folder goes on where it stopped.", "runs/MODEL-TARGET", metavar="DIR")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The same options from a TOML file; flags win over it.  [default: none]",
)
@_option(
    "--require-artifact", "An artifact that cannot be built here is an error, not a note.", "off", is_flag=True, flag_value=True
)
@_option("--json", "The report, and only it, on stdout.", "off", is_flag=True, flag_value=True)
@click.version_option(version("edge-compress"), prog_name="edge-compress")
@click.pass_context
def cli(context: click.Context, /, file: Path | None, **flags: object) -> int:
    """Make a trained vision model smaller and measurably faster, as a verified artifact for a device.

    The model is pruned by magnitude and curvature, with thresholds searched under latency measured on the device;
    fine-tuned, quantised, and checked in the artifact's own runtime. What comes out lies in the run folder:
    artifacts/TARGET/, report.html, report.json.

    \b
    Examples:
      edge-compress --target x86
          the whole pipeline on the embedded default, in minutes
      edge-compress --target x86 --model net.py:resnet20 --weights net.safetensors \\
          --data npz:cifar10.npz --max-accuracy-drop 1.0 --out runs/resnet20
          your own model and data
      edge-compress --config edge-compress.toml --seed 1
          options from a file, one of them overridden
      edge-compress verify runs/resnet20
          is every file what the report says it is, and does the artifact still answer the same?

    \b
    Exit codes:
      0    all gates passed
      1    a gate failed; the report says which
      2    an input is wrong
      3    something needed is not here: a package, a board, a GPU
      4    a device failed
      130  interrupted; the same command goes on
    """  # noqa: D301 (click wants the character, see its \b)
    if context.invoked_subcommand is not None:
        if any(context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE for name in context.params):
            raise click.UsageError(f"options before {context.invoked_subcommand!r} belong to a run; give them without a command")
        return 0
    config = settings.load(file, flags)
    from ..progress import Progress
    from ..report.summary import summary
    from ..run import run_pipeline

    with _stdout_kept_clean():
        code: int = run_pipeline(config, Progress())
    report = (config.out / "report.json").read_text(encoding="utf-8")
    click.echo(report.rstrip() if config.json else "\n".join(summary(json.loads(report), config.out)))
    return code


@cli.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--device",
    metavar="NAME",
    default="local",
    show_default=True,
    help="A name from `edge-compress devices`, a TOML file, or class:NAME for any free board of a class.",
)
@click.option("--threads", type=click.IntRange(1), metavar="COUNT", help="Threads of the runtime.  [default: the device's]")
@click.option(
    "--sessions", type=click.IntRange(1), metavar="COUNT", default=5, show_default=True, help="Fresh processes to measure in."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Also write profile.json and profile.html there.")
def profile(models: tuple[Path, ...], device: str, threads: int | None, sessions: int, out: Path | None) -> int:
    """Measure artifacts on a device: latency, memory, time by layer.

    The first is the baseline; the others are measured in turn with it.

    \b
    Example:
      edge-compress profile dense.onnx pruned.onnx --device local --out profiles/pruned
    """  # noqa: D301
    from ...devices.access import named
    from ...devices.measure.timing import TimingSettings
    from .. import progress
    from ..profile import profiling

    board = named(device)[0]
    runtime = "litert" if all(model.suffix == ".tflite" for model in models) else board.runtime
    timing = TimingSettings(threads=threads or board.threads, affinity=board.affinity, runtime=runtime, sessions=sessions)
    result = profiling.profile(models, device, timing, progress.Progress())
    click.echo("\n".join(profiling.table(result)))
    if out is not None:
        from ..codec import to_json
        from ..files import atomic_write
        from ..profile.page import to_html

        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "profile.json", json.dumps(to_json(result), indent=1) + "\n")
        atomic_write(out / "profile.html", to_html(result))
        click.echo(f"profile: {out / 'profile.html'}")
    return 0


@cli.group(invoke_without_command=True)
@click.pass_context
def devices(context: click.Context) -> int:
    """List the devices latency can be measured on; `devices check NAME` says what is missing on one."""
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
                facts.append("a template: it has no address")
            click.echo(f"{board.name}: {', '.join(board.targets)}; {', '.join(facts)}. {board.notes}".rstrip())
    return 0


@devices.command()
@click.argument("name")
def check(name: str) -> int:
    """Ask a device what it is: runtime, memory, disk, heat, clocks, noise floor; and say what is missing on it.

    \b
    Example:
      edge-compress devices check local
    """  # noqa: D301
    from ...devices import board as boards
    from ..profile import board_check

    board = boards.load(name)
    found = board_check.check(board)
    click.echo("\n".join(found.lines))
    if found.lacking:
        raise UnavailableError(f"device {board.name} is not ready", found="; ".join(found.lacking))
    click.echo(f"device {board.name} is ready for {', '.join(board.targets)}")
    return 0


for command in (verify, release, report):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code. What the user can mend is one line on stderr; a bug keeps its traceback."""
    signal.signal(signal.SIGTERM, _interrupt)  # stopped from outside is the same as Ctrl-C: folders are left, locks freed
    try:
        with cli.make_context("edge-compress", list(sys.argv[1:] if arguments is None else arguments)) as context:
            return int(cli.invoke(context))
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except click.ClickException as error:
        return _failed(f"{error.format_message().rstrip('.')}; see edge-compress --help", error.exit_code)
    except EdgeCompressError as error:
        return _failed(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _failed("interrupted; run the same command again to go on", 130)


def _failed(text: str, code: int) -> int:
    click.echo(f"edge-compress: {' '.join(text.split())}", err=True)
    return code


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """What libraries print (torch.onnx does, and C++ below it) goes to stderr: stdout is the caller's."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
