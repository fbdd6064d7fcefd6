"""The command line: parses options, makes one call, returns the exit code. Imports only what `--help` needs."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click

# Idle OpenMP threads that spin take the processor from the runtime that is being measured; read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ... import targets
from .. import config as settings
from .. import options
from ..errors import BuildError, InputError
from ..options import Pattern, Precision
from .beginning import init
from .exit_codes import exit_code_of
from .finished_runs import release, report, verify
from .inspection import inspect
from .near_misses import Commands
from .on_devices import devices, profile
from .output import echo, loading, stdout_kept_clean

_DEFAULTS = {field.name: field.default for field in fields(settings.Config)}
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _option(name: str, help: str, default: str = "", **more: Any) -> Decorator:
    """Declares an option that is None when it is not given, so that the file may set it; `default` is the text in the help."""
    field = more.pop("field", name.removeprefix("--").replace("-", "_"))
    shown = default or str(_DEFAULTS[field])
    return click.option(name, field, default=more.pop("unset", None), help=f"{help}  [default: {shown}]", **more)


def _choice(kind: type[StrEnum], *more: str) -> click.Choice[str]:
    """The values of an enumeration, and other names for some."""
    return click.Choice([*(member.value for member in kind), *more])


@click.group(
    cls=Commands,
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
@_option(
    "--recipe",
    "A Python file with model(), datasets() and perhaps loss() and metric(), instead of --model and --data: any task.",
    "none",
    metavar="FILE.py",
)
@_option("--model", "digits-resnet, torchvision:NAME, timm:NAME, FILE.py:FACTORY or package.module:FACTORY.", metavar="SPEC")
@_option(
    "--weights",
    "State dict: .safetensors, or .pt/.pth without pickled code.",
    "none, needed for all but digits-resnet",
    metavar="FILE",
)
@_option(
    "--checkpoint-key",
    "Name of the state dict to take from a file of several, such as state_dict.",
    "averaged weights (state_dict_ema, model_ema), else state_dict, model_state_dict, model or net",
    metavar="NAME",
)
@_option(
    "--data",
    "digits, npz:FILE (train_images uint8 NHWC, train_labels, test_images, test_labels), imagefolder:DIR, "
    "torchvision:NAME:DIR or FILE.py:FACTORY.",
    metavar="SPEC",
)
@_option(
    "--mean",
    "Channel means of pixels scaled to [0, 1], such as 0.49,0.48,0.45.",
    "the model's own, else ImageNet's; 0.5 for one channel",
    metavar="NUMBERS",
)
@_option(
    "--std",
    "Channel standard deviations of pixels scaled to [0, 1].",
    "the model's own, else ImageNet's; 0.5 for one channel",
    metavar="NUMBERS",
)
@_option(
    "--augment",
    "Training-time augmentation; choose what the model was trained with.",
    "shift for digits, else crop-flip",
    type=_choice(options.Augment),
)
@_option(
    "--image-size",
    "Height and width to which image files are cropped; arrays keep their size.",
    "the model's own, else 224",
    type=int,
    metavar="PIXELS",
)
@_option(
    "--exif-orientation",
    "Turn image files as their EXIF orientation says; torchvision's ImageFolder does not.",
    "off",
    is_flag=True,
    flag_value=True,
)
@_option(
    "--class-order",
    "Order of an image folder's classes: text (as torchvision), natural (9 before 10), or a file with one name a line.",
    "text",
    metavar="ORDER",
)
@_option(
    "--device", "Where latency is measured: a name from `edge-compress devices`, a TOML file, or class:NAME.", metavar="NAME"
)
@_option(
    "--pattern",
    "What is pruned: channels and residual blocks, single weights, or 2:4 (two of four weights).",
    "auto, what the target can accelerate",
    type=_choice(Pattern, "auto"),
)
@_option("--precision", "Numerical precision of the artifact.", "the target's best", type=_choice(Precision))
@_option("--float-io", "Give an int8 .tflite float input and output instead of int8.", "off", is_flag=True, flag_value=True)
@_option(
    "--latency-budget",
    "Latency target: fraction of the dense FP32 latency (0.5), or milliseconds (8ms). Several (0.7,0.5,0.3) give an artifact "
    "each; scores and latency table are computed once, and the evaluations are divided among them.",
    "0.5",
    metavar="BUDGET",
)
@_option(
    "--max-accuracy-drop", "Gate: largest drop of top-1 on the test split, in percentage points.", type=float, metavar="POINTS"
)
@_option(
    "--max-drop",
    "Gate: how much worse the metric may get on the test split, in its own unit (0.5) or in per cent of it (1%).",
    "--max-accuracy-drop for top-1, else 1%",
    metavar="DROP",
)
@_option(
    "--min-speedup",
    "Gate: minimum for the lower bound of the speedup's 95 % confidence interval.",
    type=float,
    metavar="RATIO",
)
@_option(
    "--max-size",
    "Budget and gate: largest size of the artifact's file, such as 98496, 500kB or 1.5MB.",
    "no limit",
    metavar="SIZE",
)
@_option(
    "--reward",
    "Search objective. hard: accuracy subject to the latency budget (hard constraint); soft: alpha * accuracy - beta * latency.",
    type=_choice(options.Reward),
)
@_option("--alpha", "Weight of accuracy in the soft reward.", type=float, metavar="NUMBER")
@_option("--beta", "Weight of latency (as a fraction of the dense model's) in the soft reward.", type=float, metavar="NUMBER")
@_option(
    "--lambda",
    "Exponent of the curvature in the score (0: magnitude, 1: Optimal Brain Damage), or auto.",
    "auto, tuned on the search split",
    field="lambda_",
    metavar="NUMBER",
)
@_option(
    "--score",
    "Importance criterion: hasa, magnitude, random, or the formula as published (seed is its old name).",
    type=_choice(options.Score, "seed"),
)
@_option("--search", "Search algorithm for the per-layer pruning ratios.", type=_choice(options.SearchMethod))
@_option(
    "--evaluations", "Number of distinct candidates that the search evaluates.", "200, for digits 60", type=int, metavar="COUNT"
)
@_option("--finetune-epochs", "Epochs of fine-tuning with distillation.", "15, for digits 8", type=int, metavar="COUNT")
@_option(
    "--learning-rate",
    "Peak learning rate of fine-tuning, or auto: found by short trial runs; in trainings of fewer than 800 steps 1e-3 (3e-3 "
    "where the one-shot accuracy is below 50 %, 3e-4 without BatchNorm).",
    "auto",
    metavar="NUMBER",
)
@_option(
    "--max-minutes",
    "Time limit: evaluations and epochs are reduced to fit it (estimated).",
    "no limit",
    type=float,
    metavar="NUMBER",
)
@_option(
    "--mask",
    "Masks during fine-tuning with --pattern weight: fixed, or dynamic (re-chosen after each epoch).",
    type=_choice(options.MaskMode),
)
@_option(
    "--seed",
    "Random seed. Plans also depend on the latencies measured on the device.",
    type=int,
    metavar="NUMBER",
)
@_option(
    "--accelerator",
    "Where curvature is computed and the network is reconstructed and fine-tuned; int8 is computed on the CPU.",
    type=_choice(options.Accelerator),
)
@_option(
    "--max-memory",
    "Memory that scoring, reconstruction and fine-tuning may take, such as 4GB; the report says what was reduced for it.",
    "half of what is free",
    metavar="SIZE",
)
@_option("--threads", "Threads of the artifact's runtime during measurement.", type=int, metavar="COUNT")
@_option("--out", "Run folder. Re-running the same command resumes an interrupted run.", "runs/MODEL-TARGET", metavar="DIR")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read the same options from a TOML file; flags take precedence.  [default: none]",
)
@_option(
    "--require-artifact",
    "Fail if an artifact cannot be built here, instead of noting it in the report.",
    "off",
    is_flag=True,
    flag_value=True,
)
@_option(
    "--accept-chance",
    "Continue even if the dense network's accuracy on the search split is at chance level.",
    "off",
    is_flag=True,
    flag_value=True,
)
@click.option("--dry-run", is_flag=True, help="Say what would be done and how long it would take; write nothing.  [default: off]")
@_option("--quiet", "Print no progress; RUN/run.log has it all the same.", "off", is_flag=True, flag_value=True)
@_option("--verbose", "Print a line for each step instead of bars.", "off", is_flag=True, flag_value=True)
@_option("--json", "Print only the report, as JSON, on stdout.", "off", is_flag=True, flag_value=True)
@click.version_option(version("edge-compress"), prog_name="edge-compress")
@click.pass_context
def cli(context: click.Context, /, file: Path | None, dry_run: bool, **flags: object) -> int:
    """Compress a trained network into a smaller, measurably faster, verified artifact for a device.

    Searches per-layer pruning ratios under a latency budget measured on the device, ranks units by magnitude and curvature,
    fine-tunes with distillation, quantises, and verifies accuracy and speed in the artifact's own runtime. The run folder
    then holds artifacts/TARGET/, report.html and report.json.

    \b
    Examples:
      edge-compress --target x86
          run the whole pipeline on the embedded digits network, in minutes
      edge-compress --target x86 --model net.py:resnet20 --weights net.safetensors \\
          --data npz:cifar10.npz --max-accuracy-drop 1.0 --out runs/resnet20
          compress your own image classifier on your own data
      edge-compress --target x86 --recipe recipe.py --max-drop 1% --out runs/detector
          compress any network, with the data, loss and metric of a Python file
      edge-compress --target x86 --latency-budget 0.7,0.5,0.3 --out runs/front
          a network for each of three budgets; the report shows accuracy against measured latency
      edge-compress --config edge-compress.toml --seed 1
          read options from a file, override one
      edge-compress verify runs/resnet20
          check the files against the report, and the artifact against its recorded outputs

    \b
    Exit codes:
      0    all gates passed
      1    a gate or a check failed, or the converter refused the model; the report or the list of checks says which
      2    an input is wrong
      3    something needed is missing: a package, a board, a GPU
      4    a device failed
      130  interrupted; run the same command again to resume
    """  # noqa: D301 (click wants the character, see its \b)
    if context.invoked_subcommand is not None:
        if any(context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE for name in context.params):
            raise click.UsageError(
                f"options before {context.invoked_subcommand!r} are those of a run; remove them or the command"
            )
        return 0
    config = settings.load(file, flags)
    if dry_run and config.json:
        raise InputError("--dry-run with --json", expected="one of them: a dry run has no report")
    if config.recipe is None and config.data.startswith("npz:"):  # a second's work, before PyTorch is loaded
        from ..data.npz import check_counts

        check_counts(config.data)
    if not config.quiet:
        loading()
    from ..progress import Progress
    from ..report.pages import summary
    from ..report.report import read_report
    from ..run import run_pipeline

    if dry_run:
        from ..run.dry_run import dry_run as tried

        with stdout_kept_clean():
            lines = tried(config, Progress(quiet=config.quiet, verbose=config.verbose))
        echo("\n".join(lines))
        return 0
    report = config.out / "report.json"
    try:
        with stdout_kept_clean():
            code: int = run_pipeline(config, Progress(quiet=config.quiet, verbose=config.verbose))
    except BuildError:  # refused before the search; the report says so
        if config.json and report.is_file():
            echo(report.read_text(encoding="utf-8").rstrip())
        raise
    echo(report.read_text(encoding="utf-8").rstrip() if config.json else "\n".join(summary(read_report(report), config.out)))
    return code


for command in (init, inspect, profile, devices, verify, release, report):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code, see `exit_codes.exit_code_of`."""

    def call() -> int:
        with cli.make_context("edge-compress", list(sys.argv[1:] if arguments is None else arguments)) as context:
            return int(cli.invoke(context))

    return exit_code_of(call)


def script() -> NoReturn:
    """Runs the command line as a process of its own; threads that the user's code left running do not delay its end."""
    code = main()
    others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    if others:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or a full disk
                stream.flush()
        os._exit(code)
    sys.exit(code)
