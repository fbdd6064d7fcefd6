"""Which images a stage sees: fixed, seeded draws from the train and the search split, as network inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from ..targets.base import FloatArray
from .batchnorm import reestimate_on
from .data import DataSet
from .graph import shape_of
from .preprocess import augmented, to_input
from .steady import Batch
from .subject import Loaded, fast_bfloat16
from .types import Precision, Preprocess

HELD_TENSORS = 8  # float32 activations of one image that are alive at once while a network is solved layer after layer
SCORING_IMAGES = 2000  # scores and moments are taken on
RANGE_IMAGES = 100  # the dense network's activation ranges are taken on
BATCH = 100
STATISTICS_IMAGES = 128  # a candidate's BatchNorm statistics are taken on; they are taken again for the chosen plan


@dataclass(frozen=True)
class RewardImages:
    """What a candidate answers, and what it is made ready with."""

    inputs: torch.Tensor  # (n, C, H, W) of the search split, as they are
    labels: torch.Tensor  # (n,)
    statistics: torch.Tensor  # (m, C, H, W) of the training split, augmented: BatchNorm is re-estimated on them
    bfloat16: bool = False  # re-estimate in it

    def calibration(self, precision: Precision) -> FloatArray | None:
        """What the activation ranges of int8 are taken on, (n, C, H, W); None where candidates answer in float."""
        if precision is not Precision.INT8:
            return None
        found: FloatArray = self.statistics[:RANGE_IMAGES].numpy()
        return found

    def restore(self, net: nn.Module) -> None:
        """Take the network's BatchNorm statistics anew."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            reestimate_on(net, [self.statistics])

    def judge(self, answers: FloatArray) -> tuple[float, float]:
        """Accuracy (share) and loss of logits (n, classes) for the inputs."""
        outputs = torch.from_numpy(answers)
        accuracy = float((outputs.argmax(1) == self.labels).float().mean())
        return accuracy, float(F.cross_entropy(outputs, self.labels))


def affordable(net: fx.GraphModule, count: int, room_bytes: int = 3 << 30) -> int:
    """How many images (at most `count`, at least 32) whose activations can be held for a few layers at a time.

    Args:
        net: a network whose shapes have been propagated, see `graph.propagate_shapes`.
        count: images wanted.
        room_bytes: memory they may take.
    """
    widest = max(math.prod(shape[1:]) for node in net.graph.nodes if (shape := shape_of(node)))
    return max(32, min(count, room_bytes // (4 * widest * HELD_TENSORS)))


def training_inputs(data: DataSet, prep: Preprocess, count: int, seed: int) -> torch.Tensor:
    """The first `count` training images (their order is a seeded shuffle), varied as in training: (n, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    images = data.train.read(np.arange(min(count, len(data.train))))
    return augmented(images, prep, generator)


def reward_images(data: DataSet, prep: Preprocess, count: int, seed: int) -> RewardImages:
    """The first `count` images of the search split, and a few training images for BatchNorm statistics."""
    count = min(count, len(data.search))
    inputs = to_input(data.search.read(np.arange(count)), prep)
    labels = torch.from_numpy(data.search.labels[:count].copy())
    statistics = training_inputs(data, prep, STATISTICS_IMAGES, seed + 3)
    return RewardImages(inputs, labels, statistics, fast_bfloat16("cpu"))


def scoring_inputs(loaded: Loaded, seed: int) -> torch.Tensor:
    """Training images that scores and moments are taken on: (n, C, H, W), augmented."""
    return training_inputs(loaded.data, loaded.subject.preprocess, SCORING_IMAGES, seed)


def batches(inputs: torch.Tensor) -> list[Batch]:
    """Network inputs (n, C, H, W) in batches for a curvature that asks for no labels."""
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in torch.split(inputs, BATCH)]


def calibration_batches(data: DataSet, prep: Preprocess, count: int, seed: int, batch: int = 50) -> list[FloatArray]:
    """Training images, varied as in training, to calibrate activation ranges with."""
    return [part.numpy() for part in torch.split(training_inputs(data, prep, count, seed), batch)]
