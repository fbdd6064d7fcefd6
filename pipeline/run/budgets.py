"""Several latency budgets in one run: scores, latency table and evaluated candidates are shared.

In the run folder:
    runs/a/                 the shared stages; report, plan and artifacts of the fastest network that passes all gates
    runs/a/budgets/0.5/     a whole run for this budget, with its plan, artifacts and report
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import Config
from ..files import link_or_copy
from ..progress import Progress
from ..report.front import FrontPoint, point_of, preferred
from ..report.pages import write_report
from ..report.report import Report, read_report
from ..run_context import lend_seconds
from ..run_folder import RunFolder, file_refs
from ..task.recipe import Recipe
from .stages import Prepared, prepared, run_one

FOLDER = "budgets"
FITTED = ("evaluations", "finetune-epochs")  # settings that --max-minutes chooses, by what was timed


def run_pipeline(config: Config, ui: Progress, recipe: Recipe | None = None, command: str = "") -> int:
    """Runs, or resumes, the run that `config` describes. Writes the report into `config.out`.

    Args:
        config: all options.
        ui: told of what happens.
        recipe: a `Recipe` object, in place of a file named in `config`.
        command: for the report, where the arguments of this process are not it.

    Returns:
        The exit code: 0 if every gate of every target was passed, with several budgets by one network at least; else 1.

    Raises:
        EdgeCompressError: see `errors`.
    """
    if len(config.latency_budget) == 1:
        return run_one(config, ui, recipe, command)
    with prepared(config, ui, recipe, command) as before:
        runs = _searched(before)
        codes = []
        for i, each in enumerate(runs):
            ui.say(f"budget {each.budget} ({i + 1} of {len(runs)}): {each.out}")
            with RunFolder(each, ui.say, () if config.max_minutes is None else FITTED):  # refuses a folder of another run
                before.run.folder.share(each.out)
                lend_seconds(before.run.folder, each.out)
            codes.append(run_one(each, ui, recipe, command))
        _publish(config.out, runs, before.run.notes)
    return min(codes)


def _searched(before: Prepared) -> list[Config]:
    """The configuration of each budget's run, with the searches for all of them done."""
    run, budgets = before.run, before.run.config.latency_budget
    each = -(-run.config.evaluations // len(budgets))
    if each < run.config.evaluations:
        run.notes.append(f"{run.config.evaluations} evaluations were shared: {each} for each of {len(budgets)} budgets.")
        run.ui.say(f"  {run.notes[-1]}")
    run.config = replace(run.config, evaluations=each, max_minutes=None)
    before.searched(budgets)
    return [replace(run.config, latency_budget=(budget,), out=run.config.out / FOLDER / str(budget)) for budget in budgets]


def _publish(folder: Path, runs: Sequence[Config], notes: Sequence[str]) -> None:
    """Links the preferred run's files into the run folder, and writes its report with the Pareto front."""
    reports = [read_report(each.out / "report.json") for each in runs]
    taken = preferred(reports)
    points: list[FrontPoint] = []
    for i, (each, report) in enumerate(zip(runs, reports, strict=True)):
        where = each.out.relative_to(folder).as_posix()
        points += [point_of(report, name, str(each.budget), where, i == taken) for name in report.targets]
    _put(reports[taken], runs[taken].out, folder)
    said = tuple(dict.fromkeys([*reports[taken].notes, *notes]))
    write_report(folder, replace(reports[taken], front=tuple(points), notes=said))


def _put(report: Report, source: Path, folder: Path) -> None:
    """Links the files that a report names, and the artifacts' folders, into the run folder."""
    shutil.rmtree(folder / "artifacts", ignore_errors=True)
    artifacts = [path.relative_to(source) for path in (source / "artifacts").rglob("*") if path.is_file()]
    for relative in [*artifacts, Path("plan.json"), *(Path(ref.path) for ref in file_refs(report))]:
        link_or_copy(source / relative, folder / relative)
