"""A recipe's functions tried on a few samples, before hours are spent on it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from ..network.calling import call
from ..signature import Signature, TensorSpec
from ..task.recipe_task import RecipeTask
from ..task.samples import Data, head, training_batch
from ..task.task import judged, torch_predictor

SAMPLES = 16


def checked(network: nn.Module, task: RecipeTask, signature: Signature, data: Data) -> list[str]:
    """What the network takes and gives, how many samples there are, and what loss and metric say of the dense network.

    Raises:
        InputError: the loss is not finite, or the metric gives another value for the same answers.
    """
    batch = training_batch(data.train, SAMPLES, 0)
    with torch.no_grad():
        outputs = call(network, batch.inputs)
        loss = float(task.training_loss(outputs, batch.targets, outputs))
    if not math.isfinite(loss):
        raise task.recipe.wrong("loss()", str(loss), "a finite number", "check the samples and their targets")
    some = head(data.test, SAMPLES)
    one, two = (judged(task, some, torch_predictor(network), network).value() for _ in range(2))
    if one != two and not (math.isnan(one) and math.isnan(two)):
        raise task.recipe.wrong("metric().compute()", f"{one:g} and {two:g} for the same answers", "one value")
    shown = task.metric.shown(one) if np.isfinite(one) else "no number for so few"
    return [
        f"inputs: {_told(signature.inputs)}; outputs: {_told(signature.outputs)}",
        f"samples: train {len(data.train):,}, search {len(data.search):,}, test {len(data.test):,}",
        f"loss on {SAMPLES} training samples: {loss:.4g}; {task.metric.name} on {len(some)} test samples: {shown}",
    ]


def _told(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}" for spec in specs)
