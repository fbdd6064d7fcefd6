"""What a run would do and how long it would take, without doing it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..config import Config
from ..errors import InputError
from ..pattern.base import prunable
from ..progress import Progress
from ..run_folder import RunFolder
from ..schedule.estimate import span
from ..task.recipe import Recipe
from ..verify.gates import drop_allowed
from .stages import Prepared, prepared


def dry_run(config: Config, ui: Progress, recipe: Recipe | None = None) -> list[str]:
    """The lines that say what `run_pipeline` would do with this configuration. Nothing stays behind.

    The network and the data are loaded, what can be pruned is found, and a few steps are timed.

    Raises:
        EdgeCompressError: what a run would raise before its search.
    """
    _require_place(config.out)
    RunFolder(config, ui.say).refuse_what_a_run_would()
    with (
        tempfile.TemporaryDirectory(prefix="edge-compress-") as folder,
        prepared(replace(config, out=Path(folder) / "run"), ui, recipe) as before,
    ):
        return list(_lines(before, config))


def _require_place(out: Path) -> None:
    """Makes the run folder and removes it again, unless it is there.

    Raises:
        InputError, OSError: a run could not have its folder there.
    """
    if out.exists():
        if not out.is_dir():
            raise InputError(f"{out} is a file", expected="a folder for the run", do="choose another --out")
        return
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True)
    finally:
        for folder in missing:
            if folder.is_dir():
                folder.rmdir()


def _lines(before: Prepared, given: Config) -> Iterator[str]:
    run, pruning = before.run, before.pruning
    subject, config = run.loaded.subject, run.config
    splits, metric = subject.data.splits, subject.metric
    yield f"network: {subject.model}, {subject.cost.params:,} parameters, {subject.cost.macs:,} multiply-accumulates"
    yield f"data: {subject.data.name}, {splits.train:,} training, {splits.search:,} search and {splits.test:,} test samples"
    yield from prunable(pruning)
    for target in before.chosen:
        place = before.places[target.name]
        where = "no device: latency is estimated" if place is None else f"measured on {config.device}"
        led = f", searched for, in {before.precision}" if target is before.led else ""
        yield f"target {target.name}: {target.runtime}, {where}{led}"
    budgets = ", ".join(str(budget) for budget in config.latency_budget)
    yield f"search: {config.search}, {config.evaluations} evaluations, latency budget {budgets}; pattern {run.pattern}"
    rate = "" if config.learning_rate is None else f", learning rate {config.learning_rate:g}"
    yield f"fine-tuning: {config.finetune_epochs} epochs{rate}"
    drop = drop_allowed(config, metric)
    unit = " points" if metric.unit == "%" and not drop.relative else ""
    yield f"gates: {metric.name} may get worse by {drop}{unit}; speedup at least {config.min_speedup:g}"
    for stage, seconds in before.expected.items():
        yield f"  {stage}: about {span(seconds)}"
    yield f"in all about {span(sum(before.expected.values()))} on this machine (estimated); the run folder would be {given.out}"
