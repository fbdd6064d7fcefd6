"""The stages of a run in order; the only place that knows the order.

    subject -> (train the embedded network) -> sensitivity -> search -> compensate -> fine-tune -> build -> verify -> report

Each stage is kept in the run folder under a key made of its settings and its inputs' keys, so that the same command in the same
folder resumes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import torch

from ... import targets as target_modules
from ...devices.access import open_named, require_processors
from ...devices.device import Device
from ...devices.tensorrt.device import boards_of
from ...targets.base import Limits, Target, joint
from ..build import artifact as artifacts
from ..build.dense_baseline import dense_baseline, dense_module
from ..build.precision import precision_for
from ..codec import to_json
from ..config import Config
from ..errors import BuildError, UnavailableError
from ..files import atomic_write
from ..finetune.digits import EPOCHS, train_digits
from ..network.compute import Compute, compute_for
from ..network.weights import load_weights, save_weights, state_sha256
from ..options import Budget, Precision
from ..pattern import finalists
from ..pattern.base import Pruning
from ..pattern.choice import pattern_for, pruning_for, too_narrow
from ..pattern.searching import Searched, searched
from ..profile.in_run import usage_of
from ..progress import Progress
from ..report.collect import header_of, packages_of, refusal_of, report_of
from ..report.pages import write_refusal, write_report
from ..run_context import RunContext, read_seconds
from ..run_folder import LOG_NAME, RunFolder, Stage
from ..schedule.estimate import Paces, estimate, fitted, timed, told
from ..task.load import load_subject
from ..task.recipe import Recipe
from ..task.recipe_task import RecipeTask
from ..task.samples import scoring_inputs
from ..types import (
    Artifact,
    Baseline,
    Epoch,
    FileRef,
    Subject,
    TargetResult,
    Verdict,
)
from ..verify.artifact import verified
from ..verify.engine import result as engine_result
from ..verify.gates import Allowed, allowed
from ..verify.pictures import pictures_of
from ..verify.places import places_of
from ..verify.references import Networks, references_of, sanity_check
from ..verify.unpruned import unpruned_of
from .fewer_samples import fewer_samples
from .fine_tuning import fine_tuned
from .recipe_check import checked

_PARTS = {"code": "the model's code", "model_sha256": "the weights", "data": "the data", "preprocess": "the preprocessing"}


@dataclass(frozen=True)
class Prepared:
    """What is known before the search."""

    run: RunContext
    chosen: Sequence[Target]
    led: Target  # what is searched for
    places: Mapping[str, Device | None]  # where each target's artifact runs
    limits: Limits
    subject_key: str  # of the stage that the network comes from
    pruning: Pruning
    baseline: Baseline  # of `led`
    precision: Precision  # of its candidates
    expected: Mapping[str, float]  # stage -> seconds it will take, estimated
    started: datetime

    def searched(self, budgets: Sequence[Budget]) -> list[Searched]:
        """The search for each of some budgets."""
        place = self.places[self.led.name]
        return searched(
            self.run, budgets, self.subject_key, self.pruning, self.led, self.precision, place, self.limits, self.baseline
        )


def run_one(config: Config, ui: Progress, recipe: Recipe | None = None, command: str = "") -> int:
    """Runs, or resumes, a run with one budget. Writes the report, which gives the command, into `config.out`.

    Returns:
        The exit code: 0 if every gate of every target was passed, else 1.

    Raises:
        EdgeCompressError: see `errors`.
    """
    with prepared(config, ui, recipe, command) as before:
        return _compressed(before)


@contextmanager
def prepared(config: Config, ui: Progress, recipe: Recipe | None, command: str = "") -> Iterator[Prepared]:
    """The open run folder and what is known before the search; a network that is refused meanwhile gets a report that says so.

    Raises:
        BuildError: the network cannot be searched: the converter or the runtime refused it.
    """
    started = datetime.now(UTC)
    require_processors(config.device, config.threads)
    with closing(open_named(config.device)) as board:
        chosen = [target_modules.load(name) for name in config.targets]
        for target in chosen:
            reason = target.missing()
            if reason is not None:
                raise UnavailableError(f"target {target.name} cannot be built here", found=reason)
        places = places_of(config, chosen, board)
        led = next((t for t in chosen if places[t.name] is not None), chosen[0])  # searched for: the first that can be measured
        pattern = pattern_for(config, chosen)
        compute = compute_for(config)
        _deterministic(config, compute)
        with RunFolder(config, ui.say) as folder, ui.logged(folder.path / LOG_NAME):
            loaded = load_subject(config, recipe)
            notes = list(loaded.notes)
            seconds = read_seconds(folder, notes.append)
            run = RunContext(config, ui, folder, loaded, compute, pattern, board, seconds, notes, command)
            for note in notes:
                ui.say(note)
            try:
                yield _prepared(run, chosen, led, places, started)
            except BuildError as error:
                write_refusal(folder.path, refusal_of(run, chosen, str(error), started))
                raise


def _prepared(
    run: RunContext, chosen: Sequence[Target], led: Target, places: Mapping[str, Device | None], started: datetime
) -> Prepared:
    config, folder = run.config, run.folder
    subject_key = _prepare_subject(run, chosen)
    loaded = run.loaded
    limits = joint([led, *chosen])
    images = partial(scoring_inputs, loaded.data.train, config.seed)
    pruning = pruning_for(run.pattern, loaded, limits, config, images, folder.path, run.compute)
    run.notes += too_narrow(pruning.knobs, limits, led.name)
    run.notes += fewer_samples(loaded, run.compute)
    sanity_check(run, subject_key)
    baseline = dense_baseline(run, subject_key, led, pruning.net, places[led.name])
    precision = precision_for(run, subject_key, led, pruning, baseline, places[led.name])
    expected = _planned(run, subject_key, pruning, len(chosen))
    return Prepared(run, chosen, led, places, limits, subject_key, pruning, baseline, precision, expected, started)


def _compressed(before: Prepared) -> int:
    """Runs the stages from the search on and writes the report. Returns the exit code."""
    run, pruning, places = before.run, before.pruning, before.places
    config, folder, loaded = run.config, run.folder, run.loaded
    (search,) = before.searched([config.budget])
    found, plan, solved, stage = finalists.solve(run, search.stage, pruning, search.found, search.ranking)
    checkpoint, student, tuned = fine_tuned(run, stage, pruning, plan, found.best.accuracy, solved.state)
    networks = references_of(run, tuned, checkpoint, student)
    results, usage, gates = {}, {}, allowed(config, loaded.subject.metric, networks.values.dense)
    for target in before.chosen:
        try:
            place = places[target.name]
            baseline = dense_baseline(run, before.subject_key, target, pruning.net, place)
            precision = precision_for(run, before.subject_key, target, pruning, baseline, place)
            artifact, built = artifacts.build(run, tuned, target, student, precision, baseline, place)
        except BuildError as error:  # the other targets still get theirs
            results[target.name] = TargetResult("failed", Verdict(False, (str(error),)))
        else:
            result = _judged(run, built, target, artifact, networks, gates, place)
            dense = dense_module(run, pruning.net, baseline)
            alone = partial(unpruned_of, run, before.subject_key, built, target, dense, baseline, result, place)
            quantises = artifact.precision is Precision.FP32 and Precision.INT8 in target.limits.precisions
            unpruned, quantised = alone(), alone(precision=Precision.INT8) if quantises else None
            pictures = pictures_of(run, built, target, artifact)
            results[target.name] = replace(result, unpruned=unpruned, quantised=quantised, pictures=pictures)
            usage[target.name] = usage_of(run, built, target, result)
    run.notes += folder.notes()
    run.notes += [*pruning.remarks(before.led.runtime), *engine_result.remarks(found)]
    report = report_of(
        run,
        header_of(run, before.chosen, before.started),
        networks.values,
        gates,
        results,
        plan=plan,
        knobs=pruning.knobs,
        ranking=search.ranking,
        search=found,
        solved=solved,
        checkpoint=checkpoint,
        prunable_macs_share=pruning.prunable_macs_share,
        usage=usage,
    )
    atomic_write(folder.path / "plan.json", json.dumps(to_json(plan), indent=1) + "\n")
    write_report(folder.path, report)
    return 1 if any(engine_result.breaks_a_gate(r, gates) for r in results.values()) else 0


def _planned(run: RunContext, subject_key: str, pruning: Pruning, targets: int) -> dict[str, float]:
    """Returns the estimated seconds of each remaining stage, and prints them. --max-minutes reduces evaluations and epochs.

    What was timed is kept, so that a resumed run does the same.
    """
    loaded, given = run.loaded, run.config
    paces = run.folder.stage("paces", "1", {}, (subject_key,)).once(Paces, lambda: timed(loaded, run.compute.device))

    def expected(config: Config) -> dict[str, float]:
        return estimate(paces, loaded, pruning.knobs, config, targets)

    if given.max_minutes is not None:
        run.config = fitted(given, expected, given.max_minutes)
        if run.config != given:
            evaluations, epochs = run.config.evaluations, run.config.finetune_epochs
            text = f"--max-minutes {given.max_minutes:g}: {evaluations} evaluations and {epochs} epochs of fine-tuning"
            text += f", instead of {given.evaluations} and {given.finetune_epochs}"
            run.notes.append(f"{text}; {told(expected(run.config))}.")
            run.ui.say(f"  {text}")
    found = expected(run.config)
    if "search" not in run.seconds:  # of an earlier call
        run.ui.say(f"  {told(found)}")
    return found


def _judged(
    run: RunContext,
    before: Stage,
    target: Target,
    artifact: Artifact,
    networks: Networks,
    gates: Allowed,
    place: Device | None,
) -> TargetResult:
    """The artifact on its device, or on this machine; an engine is built there first."""
    if not target.needs_device:
        return verified(run, before, target, artifact, networks, gates)
    if place is not None and boards_of(place):
        return engine_result.finished(run, before, target, artifact, networks, gates, place)
    return engine_result.unbuilt(run, before, target, artifact, networks, gates, engine_result.ABSENT.format(name=target.name))


def _deterministic(config: Config, compute: Compute) -> None:
    """The same command gives the same bits: fixed thread count, no algorithm that depends on timing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order in each call
    torch.set_num_threads(compute.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(config.seed)


def _prepare_subject(run: RunContext, chosen: Sequence[Target]) -> str:
    """Key of the subject, and of the packages that compute with it; the embedded network is trained first."""
    subject = run.loaded.subject
    packages = packages_of(chosen)
    del packages["edge-compress"]  # stages have versions of their own
    # not of the thread count, although it changes the embedded network's weights by rounding
    stage = run.folder.stage("subject", "3", {"subject": to_json(subject), "packages": packages})
    if not stage.finished:
        changed = [said for name, said in _PARTS.items() if name in stage.differing("subject")]
        changed += [f"the version of {name}" for name in sorted(stage.differing("packages"))]
        if changed:
            run.ui.say(f"changed since the last call in this folder: {', '.join(changed)}; all stages are made again")
    if not run.loaded.untrained:
        if stage.result(Subject) is None:
            if isinstance(run.loaded.task, RecipeTask):
                checked(run.loaded.module, run.loaded.task, subject.signature, run.loaded.data)
            stage.finish(subject)
        return stage.key
    ref = stage.result(FileRef)
    if ref is None:
        assert run.loaded.images is not None  # digits are
        with run.stage("train"), run.ui.bar("training the embedded network", EPOCHS) as bar:

            def tell(epoch: Epoch) -> None:
                bar.advance(1, f"loss {epoch.loss:.3f}, top-1 on the search split {epoch.search_value:.2f}")

            train_digits(run.loaded.module, run.loaded.images, subject.preprocess, run.config.seed, progress=tell)
        ref = save_weights(stage, run.loaded.module)
        stage.finish(ref)
    load_weights(run.folder.path, ref, run.loaded.module)
    trained = replace(subject, model_sha256=state_sha256(run.loaded.module))
    run.loaded = replace(run.loaded, subject=trained)
    return stage.key
