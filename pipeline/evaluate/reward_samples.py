"""Samples of the search split that candidates are judged on, and the BatchNorm re-estimation that prepares a candidate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..network.batchnorm import Moments, input_moments, match_moments
from ..network.calling import Inputs, Outputs, answers_in_parts, call, elements_of, moved
from ..network.compute import CPU, Compute
from ..network.memory import inference_batch_size
from ..network.modes import borrowed
from ..options import Precision
from ..signature import TOP1
from ..task.load import Loaded
from ..task.samples import Batch, head, held_at_once, training_inputs
from ..task.task import BATCH, Task

RANGE_SAMPLES = 100  # the dense network's activation ranges are taken on
STATISTICS_SAMPLES = 128  # a candidate's BatchNorm statistics are taken on; they are taken again for the chosen plan


@dataclass(frozen=True)
class RewardSamples:
    """Samples that candidates are judged on, and samples for their BatchNorm statistics."""

    batch: Batch  # of the search split, as they are
    statistics: Inputs  # of the training split, augmented: BatchNorm is re-estimated on them
    task: Task
    dense: nn.Module  # that candidates are compared with where the task has no labels
    compute: Compute = CPU  # of the re-estimation

    def calibration(self, precision: Precision) -> Inputs | None:
        """Network inputs that the activation ranges of int8 are taken on; None where candidates answer in float."""
        if precision is not Precision.INT8:
            return None
        return pytree.tree_map_only(torch.Tensor, lambda t: t[:RANGE_SAMPLES], self.statistics)

    def dense_moments(self, net: nn.Module) -> Moments:
        """Moments before each BatchNorm layer of the dense network (eval mode), which its candidates are matched to."""
        with self._ready(net) as statistics:
            return input_moments(net, statistics)

    def restore(self, net: nn.Module, dense: Moments, kept: Mapping[str, torch.Tensor]) -> None:
        """Re-estimate a candidate's BatchNorm statistics, see `match_moments`."""
        with self._ready(net) as statistics:
            match_moments(net, dense, statistics, kept)

    @contextmanager
    def _ready(self, net: nn.Module) -> Iterator[Inputs]:
        device = self.compute.device
        kind = torch.device(device).type
        with borrowed(net, device), torch.autocast(kind, torch.bfloat16, enabled=self.compute.autocast):
            yield moved(self.statistics, device)

    @cached_property
    def _dense_outputs(self) -> Outputs | None:
        return None if self.task.labelled else self.answers(self.dense)

    @cached_property
    def _dense_value(self) -> float:
        outputs = self._dense_outputs
        return 0.0 if outputs is None else self._value(outputs)

    def answers(self, net: nn.Module) -> Outputs:
        """A network's outputs for the samples, in float."""
        device = self.compute.device
        with borrowed(net, device), torch.inference_mode():
            size = inference_batch_size(elements_of(self.batch.inputs), BATCH)
            return answers_in_parts(net.eval(), self.batch.inputs, size, device)

    def require_value(self) -> None:
        """Checks that the metric has a value for the dense network.

        Raises:
            InputError: it has not.
        """
        value = self._value(self._dense_outputs or self.answers(self.dense))
        if not math.isfinite(value):
            raise InputError(
                f"the metric {self.task.metric.name} of the dense network, on the search split",
                found=str(value),
                expected="a number",
                do="look at metric().compute()",
            )

    def judge(self, outputs: Outputs) -> tuple[float, float]:
        """The share that searches reward, and the loss that decides between equals, of outputs for the samples."""
        share = self.task.share(self._value(outputs), self._dense_value)
        return share, self.task.distance(outputs, self.batch.targets, self._dense_outputs)

    def _value(self, outputs: Outputs) -> float:
        judge = self.task.judge()
        judge.update(outputs, self.batch, self._dense_outputs)
        return judge.value()


def judged_at_once(loaded: Loaded, count: int, compute: Compute) -> int:
    """How many of the first `count` samples of the search split candidates are judged on, outputs and dense outputs in memory."""
    with torch.inference_mode():
        outputs = sum(output.nbytes for output in call(loaded.module, loaded.example))
    return held_at_once(loaded.data.search, count, compute.fixed_bytes, 2 * outputs)


def reward_samples(loaded: Loaded, count: int, seed: int, compute: Compute = CPU) -> RewardSamples:
    """The first `count` samples of the search split, and a few training samples for BatchNorm statistics.

    Raises:
        InputError: the metric has no value for the dense network.
    """
    samples = head(loaded.data.search, judged_at_once(loaded, count, compute))
    statistics = training_inputs(loaded.data.train, STATISTICS_SAMPLES, seed + 3)
    found = RewardSamples(samples.batch(np.arange(len(samples))), statistics, loaded.task, loaded.module, compute)
    if loaded.task.metric != TOP1:
        found.require_value()
    return found
