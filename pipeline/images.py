"""Which images a stage sees: fixed, seeded draws from the train and the search split, as network inputs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import fx

from ..targets.base import FloatArray
from .data import DataSet
from .evaluate import RewardImages
from .graph import shape_of
from .preprocess import augmented, to_input
from .types import Preprocess

HELD_TENSORS = 8  # float32 activations of one image that are alive at once while a network is solved layer after layer
STATISTICS_IMAGES = 128  # a candidate's BatchNorm statistics are taken on; they are taken again for the chosen plan


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
    return RewardImages(inputs, labels, training_inputs(data, prep, STATISTICS_IMAGES, seed + 3))


def calibration_batches(data: DataSet, prep: Preprocess, count: int, seed: int, batch: int = 50) -> list[FloatArray]:
    """Training images, varied as in training, to calibrate activation ranges with."""
    return [part.numpy() for part in torch.split(training_inputs(data, prep, count, seed), batch)]
