"""A recipe's functions tried on a few samples, before hours are spent on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..finetune.state import thawed
from ..network.calling import Outputs, call, in_float
from ..signature import Signature, TensorSpec
from ..task.recipe_data import own_generators
from ..task.recipe_task import RecipeTask
from ..task.samples import Batch, Data, head, training_batch
from ..task.task import judged, torch_predictor

SAMPLES = 16


def checked(network: nn.Module, task: RecipeTask, signature: Signature, data: Data) -> list[str]:
    """What the network takes and gives, how many samples there are, and what loss and metric say of the dense network.

    Raises:
        InputError: the network cannot be trained a step, the loss is not finite, or the metric gives another value for the same
            answers.
    """
    batch = training_batch(data.train, SAMPLES, 0)
    with torch.no_grad():
        outputs = call(network, batch.inputs)
        loss = float(task.training_loss(outputs, batch.targets, outputs))
    if not math.isfinite(loss):
        raise task.recipe.wrong("loss()", str(loss), "a finite number", "check the samples and their targets")
    _trainable(network, task, batch, outputs)
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


def _trainable(network: nn.Module, task: RecipeTask, batch: Batch, wanted: Outputs) -> None:
    """One step of training of a copy, short of its optimizer: what only training shows would end a run after its search."""
    recipe = task.recipe
    with recipe.calling("copy.deepcopy(model())"):
        student = copy.deepcopy(network).train()
    thawed(student)
    with own_generators(), torch.enable_grad():
        with recipe.calling("model().forward in train mode"):
            found = tuple(in_float(output) for output in call(student, batch.inputs))
        shapes = [[tuple(output.shape) for output in outputs] for outputs in (found, wanted)]
        if shapes[0] != shapes[1]:
            told = f"outputs of {_shapes(shapes[0])} in train mode, {_shapes(shapes[1])} in eval mode"
            raise recipe.wrong("model().forward", told, "the same outputs in both", "pick them in outputs()")
        loss = task.training_loss(found, batch.targets, wanted)
        with recipe.calling("loss() in train mode, backward"):
            loss.backward()  # type: ignore[no-untyped-call]


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _told(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {'x'.join(map(str, spec.shape)) or 'scalar'}" for spec in specs)
