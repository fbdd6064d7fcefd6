"""What the user's network is for: how its outputs are judged, and what it is trained to.

Everything after loading asks a `Task`; image classification (`classification.py`) and a user's recipe (`recipe_task.py`) are two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...targets.base import Runner, Target
from ..errors import InputError
from ..network.calling import Inputs, Outputs, call, elements_of, in_float, moved, per_sample, tensors_of
from ..network.memory import inference_batch_size
from ..network.modes import borrowed
from ..signature import Metric, Signature, TensorSpec
from .samples import Batch, Samples

BATCH = 100  # samples that a network answers at once, at most
FIRST = 8  # that tell how large they are
Predict = Callable[[Batch], Outputs]  # a network's or an artifact's outputs for a batch
IntArray = NDArray[np.int64]


class Judge(Protocol):
    """Collects a network's or an artifact's outputs on a split, and says what they are worth."""

    def update(self, outputs: Outputs, batch: Batch, dense: Outputs | None = None) -> None:
        """Take in the outputs for a batch; `dense`: the dense network's for the same, where the task `compares`."""
        ...

    def value(self) -> float:
        """The metric's value of all that was taken in."""
        ...

    def per_sample(self) -> NDArray[np.float64] | None:
        """The metric's value of each sample, of which `value` is the mean; None where it is not such a mean."""
        ...

    def over(self, picked: IntArray) -> float | None:
        """The metric's value of some samples, by position, some perhaps several times; None where the outputs were not kept."""
        ...


class Task(Protocol):
    """One kind of network."""

    @property
    def metric(self) -> Metric:
        """What its quality is told in."""
        ...

    @property
    def compares(self) -> bool:
        """Whether outputs are judged against the dense network's instead of labels."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether `distance` goes by labels alone and does not ask for the dense network's outputs."""
        ...

    @property
    def key(self) -> str:
        """What training depends on besides samples and metric."""
        ...

    def judge(self) -> Judge:
        """A judge that has seen nothing."""
        ...

    def training_loss(self, outputs: Outputs, targets: Any, dense: Outputs | None) -> Tensor:
        """What fine-tuning lowers: a scalar; `dense`: the dense network's outputs for the same inputs, None: not asked."""
        ...

    def distance(self, outputs: Outputs, targets: Any, dense: Outputs | None) -> float:
        """A smooth figure that tells candidates of equal value apart; the lower the better."""
        ...

    def picture(self, batch: Batch, outputs: Outputs) -> NDArray[np.uint8] | None:
        """Returns an RGB visualisation (H, W, 3) of a sample and its outputs, batch size 1; None if the task has none."""
        ...

    def share(self, value: float, dense: float) -> float:
        """A value on the scale that searches reward: 1 is the best there is, or as good as the dense network."""
        ...


def torch_predictor(module: nn.Module, device: str = "cpu", layout: torch.memory_format | None = None) -> Predict:
    """Answers of a PyTorch network, see `in_float`, on the CPU; the network is in eval mode meanwhile."""

    def predict(batch: Batch) -> Outputs:
        with borrowed(module, device), torch.inference_mode():
            module.eval()
            return tuple(in_float(o).cpu() for o in call(module, moved(batch.inputs, device, layout)))

    return predict


def artifact_predictor(target: Target, run: Runner) -> Predict:
    """Answers of an artifact in its own runtime."""
    return lambda batch: tensors_of(run(batch.artifact_inputs(target)))


def batches_of(samples: Samples, most: int = BATCH) -> Iterator[Batch]:
    """All samples of a split, as they are, in order; of large ones a few at once."""
    first, size = 0, min(FIRST, most)
    while first < len(samples):
        batch = samples.batch(np.arange(first, min(first + size, len(samples))))
        first += size
        size = inference_batch_size(elements_of(batch.inputs), most)
        yield batch


def judged(task: Task, samples: Samples, predict: Predict, dense: nn.Module | None = None, device: str = "cpu") -> Judge:
    """A judge that has seen the outputs for all samples of a split; `dense` is asked where the task `compares`.

    Raises:
        ValueError: there are no samples.
    """
    if not len(samples):
        raise ValueError("a split without samples cannot be judged")
    judge, guide = task.judge(), torch_predictor(dense, device) if task.compares and dense is not None else None
    for batch in batches_of(samples):
        judge.update(predict(batch), batch, None if guide is None else guide(batch))
    return judge


def agreement(one: Outputs, other: Outputs) -> Tensor:
    """Of each sample (n,), how far two networks agree: equal classes (1 or 0) for class scores, else the mean over outputs.

    Outputs of several numbers agree by their cosine; those of one number, of which a cosine tells only the sign, by how close
    they are in units of the standard deviation of `other`; those that are not floating by the share of equal numbers.
    """
    if len(one) == 1 and one[0].ndim == 2 and one[0].shape[1] > 1:
        valid = ~one[0].isnan().any(1) & ~other[0].isnan().any(1)  # argmax takes a NaN for the largest
        return ((one[0].argmax(1) == other[0].argmax(1)) & valid).double()
    alike = [per_sample(_alike if b.is_floating_point() else _equal, (a,), (b,)) for a, b in zip(one, other, strict=True)]
    return torch.stack(alike).mean(0).nan_to_num(0.0)


def _equal(one: Tensor, other: Tensor) -> Tensor:
    return (one == other).double().mean(1)


def _alike(one: Tensor, other: Tensor) -> Tensor:
    if other.shape[1] > 1:
        found = F.cosine_similarity(one, other, dim=1)
    else:
        spread = other.std(correction=0)
        spread = spread if spread > 0 else other.abs().mean()  # of one sample
        found = (1.0 - (one - other).abs() / spread.clamp_min(1e-12)).clamp_min(0.0)[:, 0]
    return torch.where((one == other).all(1), 1.0, found)  # zero vectors have no cosine


def scaled_distance(outputs: Outputs, dense: Outputs) -> Tensor:
    """The mean over outputs of the squared distance to the dense network's, each in units of the dense output's variance.

    Raises:
        InputError: they are not as many.
    """
    if len(outputs) != len(dense):
        found = f"{len(outputs)} outputs in train mode, {len(dense)} in eval mode"
        raise InputError("model().forward", found=found, expected="the same outputs in both", do="give a loss() for them")
    parts = [
        (found.float() - wanted.float()).square().mean() / wanted.float().var(correction=0).clamp_min(1e-12)
        for found, wanted in zip(outputs, dense, strict=True)
        if wanted.is_floating_point()
    ]
    return torch.stack(parts).mean()


def score_on(task: Task, target: Target, samples: Samples, dense: nn.Module) -> Callable[[Runner], float]:
    """Scores artifacts of a target on one split: the metric's value, negated where less is better. Samples are read once."""
    sign = 1.0 if task.metric.higher_is_better else -1.0
    held = functools.cache(samples.held)
    return lambda run: sign * judged(task, held(), artifact_predictor(target, run), dense).value()


def signature_of(inputs: Inputs, outputs: Outputs, input_names: list[str], output_names: list[str]) -> Signature:
    """The signature of a network, from inputs and outputs of some samples."""

    def spec(name: str, tensor: Tensor) -> TensorSpec:
        return TensorSpec(name, tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))

    leaves = pytree.tree_leaves(inputs)
    return Signature(
        tuple(spec(n, t) for n, t in zip(input_names, leaves, strict=True)),
        tuple(spec(n, t) for n, t in zip(output_names, outputs, strict=True)),
        isinstance(inputs, dict),
    )
