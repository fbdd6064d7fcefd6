"""The planned network, its layers solved, trained with the dense network as its teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..codec import to_json
from ..evaluate.reward_samples import STATISTICS_SAMPLES
from ..finetune.learning_rate_search import RATES, LearningRate, search_learning_rate, steps_of
from ..finetune.state import thawed
from ..finetune.training import FinetuneSettings, Step, batch_for, finetune, learning_rate_for
from ..network.batchnorm import statistics_match_data
from ..network.cost import cost_of
from ..network.memory import micro_batch_size
from ..network.weights import load_weights, save_weights
from ..pattern.base import Pruning
from ..run_context import RunContext
from ..run_folder import Stage
from ..task.samples import training_inputs
from ..types import Checkpoint, Epoch, FileRef, Plan

REMASK_IMAGES = 500  # the gradients of masked connections are taken on


def fine_tuned(
    run: RunContext, before: Stage, pruning: Pruning, plan: Plan, one_shot: float, start: FileRef
) -> tuple[Checkpoint, nn.Module, Stage]:
    """The trained network's checkpoint, the network, and the stage that made it.

    Args:
        run: its options, data and folder.
        before: the stage that solved the layers.
        pruning: that made the plan.
        plan: what is removed.
        one_shot: accuracy (share) of the plan in the search; the first learning rate goes by it.
        start: weights to start from.
    """
    config, loaded, student = run.config, run.loaded, pruning.blank(plan)
    batch, trainable = batch_for(len(loaded.data.train)), copy.deepcopy(student)
    thawed(trainable)  # of a frozen network autograd keeps nothing; it is trained all the same
    how = FinetuneSettings(
        config.finetune_epochs,
        config.seed,
        config.learning_rate or learning_rate_for(one_shot, pruning.net),
        batch=batch,
        micro_batch=micro_batch_size(trainable, loaded.example, batch, run.compute.fixed_bytes),
        device=run.compute.device,
        autocast=run.compute.autocast,
    )
    frozen = cache(lambda: not _statistics_match(run))
    how = replace(how, learning_rate=_rate(run, before, pruning, plan, how, start, frozen))
    settings = {"plan": to_json(plan), "finetune": how.recipe(), "mask": config.mask}
    stage = run.folder.stage("finetune", "5", settings, (before.key,))
    checkpoint = stage.result(Checkpoint)
    if checkpoint is None:
        if how.micro_batch is not None and config.finetune_epochs:
            seen = any(isinstance(layer, _BatchNorm) for layer in student.modules()) and not frozen()
            stage.note(
                f"Fine-tuning used gradient accumulation, {how.micro_batch} samples at a time for batches of {how.batch}: the"
                f" activations of a batch exceed {run.compute.fixed_bytes / 2**30:.1f} GiB."
                + (f" BatchNorm's statistics are those of {how.micro_batch} samples." if seen else "")
            )
        if frozen():
            how = replace(how, frozen_norms=True)
            stage.note("BatchNorm is frozen in fine-tuning: the network's running statistics do not match the data.")
        load_weights(run.folder.path, start, student)
        steps = config.finetune_epochs * -(-len(loaded.data.train) // how.batch)
        with run.stage("fine-tune"), run.ui.bar("fine-tuning", steps) as bar:

            def tell(event: Step | Epoch) -> None:
                if isinstance(event, Epoch):
                    shown = loaded.subject.metric.shown(event.search_value)
                    name = loaded.subject.metric.name
                    run.ui.say(f"  epoch {event.epoch}: loss {event.loss:.3f}, {name} on the search split {shown}")
                else:
                    bar.advance(1, f"loss {event.loss:.3f}")

            masks, remask = pruning.masks(plan), None
            if config.mask == "dynamic":
                inputs = training_inputs(loaded.data.train, REMASK_IMAGES, config.seed + 4)
                remask = pruning.remask(plan, loaded.module, inputs, config.finetune_epochs)
            history = finetune(
                student,
                loaded.module,
                loaded.data,
                loaded.task,
                how,
                folder=stage.folder,
                masks=masks,
                remask=remask,
                progress=tell,
                note=stage.note,
            )
        sparsity = pruning.sparsity(loaded.module, student)
        checkpoint = Checkpoint(save_weights(stage, student), history, cost_of(student, loaded.example), sparsity)
        stage.finish(checkpoint)
    load_weights(run.folder.path, checkpoint.state, student)
    return checkpoint, student, stage


def _rate(
    run: RunContext,
    before: Stage,
    pruning: Pruning,
    plan: Plan,
    how: FinetuneSettings,
    start: FileRef,
    frozen: Callable[[], bool],
) -> float:
    """The highest learning rate, kept as a stage; another one than usual is said in the report."""
    if run.config.learning_rate is not None or steps_of(run.loaded.data, how) == 0:
        return how.learning_rate
    settings = {"plan": to_json(plan), "finetune": how.recipe(), "rates": RATES}
    stage = run.folder.stage("learning-rate", "3", settings, (before.key,))

    def search() -> LearningRate:
        student = pruning.blank(plan)
        load_weights(run.folder.path, start, student)
        own = replace(how, frozen_norms=frozen())
        with run.stage("learning rate"):
            found = search_learning_rate(
                student,
                run.loaded.module,
                run.loaded.data,
                run.loaded.task,
                own,
                masks=pruning.masks(plan),
                tell=lambda line: run.ui.say(f"  {line}"),
            )
        if found.rate != how.learning_rate:
            shown = run.loaded.subject.metric.shown
            at = ", ".join(f"{shown(value)} at {rate:.0e}" for rate, value in found.tried)
            trials = f"trials ended at {at} on the search split" if at else "every trial diverged"
            started = f"from {shown(found.before)} before"
            stage.note(f"Fine-tuned at a learning rate of {found.rate:.0e}, from a search: {trials}, {started}.")
        return found

    return stage.once(LearningRate, search).rate


def _statistics_match(run: RunContext) -> bool:
    inputs = training_inputs(run.loaded.data.train, STATISTICS_SAMPLES, run.config.seed + 3)
    return statistics_match_data(run.loaded.module, inputs)
