"""The Python way in: `compress` and `load`, re-exported by `import edge_compress`.

What outlives a call are its files alone: threads, determinism and random states of the process are put back.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from torch import nn

from .. import config as settings
from ..codec import MOST_JSON_BYTES, from_json, parsed
from ..errors import InputError, described
from ..files import read_referenced, read_regular
from ..pattern.rebuild import rebuilt
from ..progress import Progress
from ..report.report import Report, read_report
from ..run import run_pipeline
from ..task.recipe import Recipe, network_of, read_recipe
from ..types import Plan


@dataclass(frozen=True)
class Result:
    """What came of a run."""

    folder: Path
    report: Report
    model: Callable[[], nn.Module] | None = None  # gives the dense network

    @property
    def passed(self) -> bool:
        """Whether every gate of every target was passed."""
        return self.report.passed

    @property
    def artifacts(self) -> dict[str, Path]:
        """Target -> its artifact's file, of the targets that have one."""
        found = {name: target.artifact for name, target in self.report.targets.items()}
        return {name: self.folder / artifact.path for name, artifact in found.items() if artifact is not None}

    @cached_property
    def module(self) -> nn.Module:
        """The pruned, trained network, of the user's own class.

        Raises:
            InputError: the run was not made from a recipe; `load` takes a factory.
        """
        if self.model is None:
            raise InputError("the pruned network", found="a run without a recipe", do="edge_compress.load(run, model=factory)")
        return load(self.folder, self.model)


def compress(
    recipe: str | Path | Recipe | None = None,
    *,
    target: str | tuple[str, ...] = "x86",
    out: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Runs, or resumes, the whole pipeline; the result of `edge-compress --target TARGET --recipe FILE` with these options.

    Args:
        recipe: a file, or a `Recipe`; None: `model`, `weights` and `data` among the options say what is compressed.
        target: one or several.
        out: the run folder; by default runs/NAME-TARGETS.
        progress: told of what happens; by default standard error is.
        options: of the command line, dashes as underscores: `latency_budget=0.5`, `max_drop="1%"`, `finetune_epochs=5`.

    Raises:
        EdgeCompressError: see `errors`.
        TypeError: no such option.
    """
    known = {field.name for field in fields(settings.Config)}
    if unknown := options.keys() - known:
        raise TypeError(f"compress() has no option {min(unknown)!r}")
    own = recipe if isinstance(recipe, Recipe) else None
    values = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    values |= {"targets": target} | ({} if out is None else {"out": str(out)})
    if recipe is not None:
        values["recipe"] = str(recipe) if own is None else own.name
    config = settings.load(None, values)
    with _left_as_it_was():
        run_pipeline(
            config, progress or Progress(quiet=config.quiet, verbose=config.verbose), own, _command(values, own is not None)
        )
    read = own or (read_recipe(config.recipe) if config.recipe is not None else None)
    factory = None if read is None else (lambda: network_of(read))
    return Result(config.out, read_report(config.out / "report.json"), factory)


def load(run: str | Path, model: Callable[[], nn.Module]) -> nn.Module:
    """The pruned, trained network of a run, on the network that a factory gives: plan and state dict, no pickle.

    It is of the factory's own class; a block with a zero-padded shortcut is a `GraphModule`.

    Args:
        run: the run folder.
        model: gives the dense network, with any weights.

    Raises:
        InputError: no finished run, weights other than those of its report, or another network.
    """
    folder = Path(run)
    report = read_report(folder / "report.json")
    try:
        plan = from_json(Plan, parsed(read_regular(folder / "plan.json", MOST_JSON_BYTES)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}/plan.json cannot be read", found=str(error), do="run again") from error
    weights = read_referenced(report.pruned.state, folder)
    if weights is None:
        what, expected = f"{folder / report.pruned.state.path}, the weights of the run", "the content that the report names"
        raise InputError(what, found="missing, a link, or another content", expected=expected, do="run again")
    with _left_as_it_was():
        try:
            state = tensors_of(weights)
            module = rebuilt(model(), report.signature, plan)
            module.load_state_dict(state)
        except InputError:
            raise
        except Exception as error:  # another network's forward, its own arguments, its own weights
            do = "give a function that returns the network of the run, dense"
            raise InputError(f"{folder} on the network given", found=described(error), do=do) from error
    return module.eval()


def _command(values: Mapping[str, Any], from_object: bool) -> str:
    """The command line with the options of a call, not with those of the process; of a `Recipe` object the call itself."""
    if from_object:
        named = {"target": values["targets"]} | {n: v for n, v in values.items() if n not in ("recipe", "targets")}
        return f"edge_compress.compress({', '.join(['recipe', *(f'{name}={value!r}' for name, value in named.items())])})"
    words = ["edge-compress"]
    for name, value in values.items():
        option = f"--{settings.key(name)}"
        if name == "targets":
            words += chain.from_iterable((option, one) for one in ([value] if isinstance(value, str) else value))
        elif isinstance(value, bool):
            words += [option] * value
        elif value is not None:
            words += [option, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join(words)


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Threads, determinism and random state of the process are put back."""
    threads, certain = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn, workspace = torch.is_deterministic_algorithms_warn_only_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(certain, warn_only=warn)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
