"""Which images a stage sees: fixed, seeded draws from the train and the search split, as network inputs."""

from __future__ import annotations

import numpy as np
import torch

from ...targets.base import FloatArray
from ..network.exact_mode import Batch
from ..types import Preprocess
from .load import Loaded
from .preprocess import to_input, varied
from .splits import DataSet, UInt8Array, network_inputs

SCORING_IMAGES = 2000  # scores and moments are taken on
BATCH = 100


def training_inputs(data: DataSet, prep: Preprocess, count: int, seed: int) -> torch.Tensor:
    """The first `count` training images (their order is a seeded shuffle), varied as in training: (n, C, H, W)."""
    return to_input(_training_pixels(data, prep, count, seed), prep)


def _training_pixels(data: DataSet, prep: Preprocess, count: int, seed: int) -> UInt8Array:
    generator = torch.Generator().manual_seed(seed)
    images = data.train.read(np.arange(min(count, len(data.train))))
    return varied(images, prep.augment, generator)


def scoring_inputs(loaded: Loaded, seed: int) -> torch.Tensor:
    """Training images that scores and moments are taken on: (n, C, H, W), augmented."""
    return training_inputs(loaded.data, loaded.subject.preprocess, SCORING_IMAGES, seed)


def batches(inputs: torch.Tensor) -> list[Batch]:
    """Network inputs (n, C, H, W) in batches for a curvature that asks for no labels."""
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in torch.split(inputs, BATCH)]


def calibration_batches(data: DataSet, prep: Preprocess, count: int, seed: int, batch: int = 50) -> list[FloatArray]:
    """The calibration set: training images, varied as in training, as network inputs."""
    return [network_inputs(part, prep) for part in calibration_pixels(data, prep, count, seed, batch)]


def calibration_pixels(data: DataSet, prep: Preprocess, count: int, seed: int, batch: int = 50) -> list[UInt8Array]:
    """The same images as pixels (n, H, W, C)."""
    pixels = _training_pixels(data, prep, count, seed)
    return [pixels[first : first + batch] for first in range(0, len(pixels), batch)]
