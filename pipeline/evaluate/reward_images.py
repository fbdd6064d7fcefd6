"""Images of the search split that candidates are judged on, and the BatchNorm re-estimation that prepares a candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...targets.base import FloatArray
from ..compute import CPU, Compute
from ..network.batchnorm import Moments, input_moments, match_moments
from ..network.modes import borrowed
from ..task.preprocess import to_input
from ..task.samples import training_inputs
from ..task.splits import DataSet
from ..types import Precision, Preprocess

RANGE_IMAGES = 100  # the dense network's activation ranges are taken on
STATISTICS_IMAGES = 128  # a candidate's BatchNorm statistics are taken on; they are taken again for the chosen plan


@dataclass(frozen=True)
class RewardImages:
    """Images that candidates are judged on, and images for their BatchNorm statistics."""

    inputs: torch.Tensor  # (n, C, H, W) of the search split, as they are
    labels: torch.Tensor  # (n,)
    statistics: torch.Tensor  # (m, C, H, W) of the training split, augmented: BatchNorm is re-estimated on them
    compute: Compute = CPU  # of the re-estimation

    def calibration(self, precision: Precision) -> FloatArray | None:
        """What the activation ranges of int8 are taken on, (n, C, H, W); None where candidates answer in float."""
        if precision is not Precision.INT8:
            return None
        found: FloatArray = self.statistics[:RANGE_IMAGES].numpy()
        return found

    def dense_moments(self, net: nn.Module) -> Moments:
        """Moments before each BatchNorm layer of the dense network (eval mode), which its candidates are matched to."""
        with self._ready(net) as statistics:
            return input_moments(net, statistics)

    def restore(self, net: nn.Module, dense: Moments, kept: Mapping[str, torch.Tensor]) -> None:
        """Re-estimate a candidate's BatchNorm statistics, see `match_moments`."""
        with self._ready(net) as statistics:
            match_moments(net, dense, statistics, kept)

    @contextmanager
    def _ready(self, net: nn.Module) -> Iterator[torch.Tensor]:
        device = self.compute.device
        kind = torch.device(device).type
        with borrowed(net, device), torch.autocast(kind, torch.bfloat16, enabled=self.compute.autocast):
            yield self.statistics.to(device)

    def judge(self, answers: FloatArray) -> tuple[float, float]:
        """Accuracy (share) and loss of logits (n, classes) for the inputs."""
        outputs = torch.from_numpy(answers)
        accuracy = float((outputs.argmax(1) == self.labels).float().mean())
        return accuracy, float(F.cross_entropy(outputs, self.labels))


def reward_images(data: DataSet, prep: Preprocess, count: int, seed: int, compute: Compute = CPU) -> RewardImages:
    """The first `count` images of the search split, and a few training images for BatchNorm statistics."""
    count = min(count, len(data.search))
    inputs = to_input(data.search.read(np.arange(count)), prep)
    labels = torch.from_numpy(data.search.labels[:count].copy())
    statistics = training_inputs(data, prep, STATISTICS_IMAGES, seed + 3)
    return RewardImages(inputs, labels, statistics, compute)
