"""The dense and the pruned PyTorch network on the test split, which artifacts are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...targets.base import Target
from ..errors import InputError
from ..network.calling import Outputs, count_of
from ..run_context import RunContext
from ..run_folder import Stage
from ..signature import TOP1
from ..task.samples import Batch, Samples, head
from ..task.task import Predict, agreement, artifact_predictor, batches_of, judged, torch_predictor
from ..types import Accuracy, Artifact, Checkpoint, Kind
from .by_class import by_class, confused
from .gates import compare
from .statistics import share_ci95

IntArray = NDArray[np.int64]
SANITY_SAMPLES = 200  # samples
SHUFFLES = 3  # of the targets
FEW_TEST_SAMPLES = 200  # below, an interval is wider than seven points either way


@dataclass(frozen=True)
class References:
    """Values of the metric of the PyTorch networks."""

    dense: float  # test split
    pruned: float
    dense_search: float  # search split


@dataclass(frozen=True)
class SanityCheck:
    """Value of the metric of the dense network on the first samples of the search split, before the search."""

    value: float
    samples: int


@dataclass(frozen=True)
class Networks:
    """The PyTorch networks that an artifact is compared with, and what they are worth."""

    values: References
    pruned: nn.Module


def sanity_check(run: RunContext, subject_key: str) -> None:
    """Reports the dense network's metric on some samples of the search split, with a note where it may be at chance level.

    All later figures are relative to the dense network, so wrong weights, labels or preprocessing would pass unnoticed.

    Raises:
        InputError: a classifier is within one standard error of chance, or below, and `--accept-chance` was not given.
    """
    loaded, task = run.loaded, run.loaded.task
    stage = run.folder.stage("sanity-check", "3", {"samples": SANITY_SAMPLES}, (subject_key,))
    if task.compares or stage.result(SanityCheck) is not None:
        return
    some = head(loaded.data.search, SANITY_SAMPLES).held()
    classifier = bool(loaded.subject.data.classes) and task.metric == TOP1
    value, *shuffled = _on_targets(run, some, 0 if classifier or len(some) < 2 else SHUFFLES)
    found = SanityCheck(value, len(some))
    shown, things = task.metric.shown(found.value), "images" if loaded.subject.data.image_shape else "samples"
    run.ui.say(f"  dense network: {shown} {task.metric.name} on {found.samples} {things} of the search split")
    if classifier:
        _note_on_classes(run, stage, found, some)
    elif shuffled:
        chance = max(shuffled) if task.metric.higher_is_better else min(shuffled)
        if task.metric.drop(value, chance) <= 0.0:
            stage.note(
                f"The dense network's {task.metric.name} is {shown} on {found.samples} {things} of the search split, and"
                f" {task.metric.shown(chance)} when its outputs are judged by the targets of other {things}: check the weights,"
                " the order of the targets and the scaling of the inputs."
            )
    stage.finish(found)


def _note_on_classes(run: RunContext, stage: Stage, found: SanityCheck, some: Samples) -> None:
    loaded = run.loaded
    classes = len(loaded.subject.data.classes)
    chance = 100.0 / classes
    spread = math.sqrt(chance * (100.0 - chance) / found.samples)
    right = f"right on {found.value:.1f} % of {found.samples} search images, which is chance for {classes} classes"
    if found.value <= chance + spread and not run.config.accept_chance:
        raise InputError(
            f"the dense network is {right}",
            expected="a trained network, and the data it was trained for",
            do="check the weights, the order of the classes (--class-order), --mean and --std; or --accept-chance",
        )
    if share_ci95(found.value, found.samples)[0] <= chance:
        stage.note(
            f"The dense network is {right}: check the weights, the order of the classes (--class-order), --mean and --std."
        )
    if len(loaded.data.test) < FEW_TEST_SAMPLES:
        count = len(loaded.data.test)
        low, high = share_ci95(50.0, count)
        stage.note(
            f"The test split has {count} images: an accuracy on it is known to about {(high - low) / 2:.0f} points either way"
            " (95 % interval), and a smaller loss cannot be told from none."
        )
    if kind := _normalised(torch_predictor(loaded.module, run.compute.device)(some.batch(np.arange(min(8, len(some)))))[0]):
        stage.note(
            f"The network's outputs are {kind}, not logits: classes and gates are the same, distillation sees them as they are."
        )


def _on_targets(run: RunContext, samples: Samples, shuffles: int) -> list[float]:
    """Returns the dense network's metric on samples, then on the same outputs with shuffled targets: chance level of any task."""
    task, predict = run.loaded.task, torch_predictor(run.loaded.module, run.compute.device)
    rng = np.random.default_rng(run.config.seed)
    orders, first = [rng.permutation(len(samples)) for _ in range(shuffles)], 0
    judges = [task.judge() for _ in range(1 + shuffles)]
    for batch in batches_of(samples):
        outputs, last = predict(batch), first + count_of(batch.inputs)
        for judge, targets in zip(judges, (batch, *(samples.batch(order[first:last]) for order in orders)), strict=True):
            judge.update(outputs, targets)
        first = last
    return [judge.value() for judge in judges]


def _predicted(scores: Tensor) -> Tensor:
    """The class of each row of scores (n, classes); -1 where one is NaN, which argmax would take for the largest."""
    return scores.argmax(1).masked_fill(scores.isnan().any(1), -1)


def _normalised(outputs: Tensor) -> str:
    """Returns "probabilities" or "logarithms of probabilities" for normalised outputs (n, classes), "" for logits."""
    outputs = outputs.double()
    if bool((outputs >= 0).all()) and torch.allclose(outputs.sum(1), torch.ones(len(outputs)).double(), atol=1e-3):
        return "probabilities"
    if bool((outputs <= 0).all()) and torch.allclose(outputs.exp().sum(1), torch.ones(len(outputs)).double(), atol=1e-3):
        return "logarithms of probabilities"
    return ""


def references_of(run: RunContext, before: Stage, checkpoint: Checkpoint, student: nn.Module) -> Networks:
    """The networks on the test split, which nothing was chosen on."""
    data, task, dense, device = run.loaded.data, run.loaded.task, run.loaded.module, run.compute.device
    stage = run.folder.stage("test-split", "4", {}, (before.key, checkpoint.state.sha256))

    def ask() -> References:
        def value(net: nn.Module, samples: Samples) -> float:
            return judged(task, samples, torch_predictor(net, device), dense, device).value()

        with run.stage("test split"):
            found = References(value(dense, data.test), value(student, data.test), value(dense, data.search))
        if not math.isfinite(found.dense):
            raise InputError(f"the metric {task.metric.name} of the dense network", found=str(found.dense), expected="a number")
        return found

    return Networks(stage.once(References, ask), student)


def accuracy_stage(run: RunContext, before: Stage, artifact: Artifact) -> Stage:
    """Where the accuracy of an artifact's file, computed on this machine, is kept."""
    return run.folder.stage(f"accuracy-{artifact.target}", "6", {}, (before.key, artifact.file.sha256))


def accuracy_here(run: RunContext, target: Target, artifact: Artifact, networks: Networks, kind: Kind) -> Accuracy:
    """Accuracy of the artifact on the whole test split, computed by its target's runner on this machine."""
    test = run.loaded.data.test
    with target.runner(run.folder.path / artifact.file.path) as answer:
        return _accuracy(run, test, artifact_predictor(target, answer), networks, kind)


def accuracy_of(run: RunContext, outputs: Outputs, picked: IntArray, networks: Networks, kind: Kind) -> Accuracy:
    """Accuracy by outputs for the test samples at positions `picked`, beside the PyTorch networks' on the same."""
    return _accuracy(run, run.loaded.data.test.picked(picked), recorded(outputs), networks, kind)


def recorded(outputs: Outputs) -> Predict:
    """Gives outputs that are known already, batch after batch."""
    given = 0

    def predict(batch: Batch) -> Outputs:
        nonlocal given
        first, given = given, given + count_of(batch.inputs)
        return tuple(output[first:given] for output in outputs)

    return predict


def _accuracy(run: RunContext, samples: Samples, predict: Predict, networks: Networks, kind: Kind) -> Accuracy:
    task, device = run.loaded.task, run.compute.device
    dense, pruned = torch_predictor(run.loaded.module, device), torch_predictor(networks.pruned, device)
    own, before, agreed, predicted = task.judge(), task.judge(), [], []
    for batch in batches_of(samples):
        answered, wanted = predict(batch), dense(batch)
        own.update(answered, batch, wanted)
        before.update(wanted, batch, wanted)
        agreed.append(agreement(answered, pruned(batch)))
        if task.metric == TOP1 and isinstance(batch.targets, torch.Tensor):  # not those of a recipe, which can be anything
            predicted.append(torch.stack([batch.targets, *(_predicted(scores[0]) for scores in (wanted, answered))]))
    found = compare(task.metric, own, before, float(torch.cat(agreed).mean()), len(samples), kind)
    each = before.per_sample(), own.per_sample()
    if not predicted or each[0] is None or each[1] is None:
        return found
    names, (labels, whole, cut) = run.loaded.subject.data.classes, torch.cat(predicted, 1).numpy()
    counts = by_class(labels, each[0] > 50.0, each[1] > 50.0, names)
    return replace(found, classes=counts, confused=confused(labels, whole, cut, names))
