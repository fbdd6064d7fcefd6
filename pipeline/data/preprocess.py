"""From stored uint8 pixels to network inputs, plain or varied as in training.

Fine-tuning, BatchNorm statistics and calibration must all see images varied the way the network was trained: BatchNorm
statistics re-estimated on plain images cost a CIFAR-10 ResNet-20 that was trained on crops and flips 2.7 points.
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import InputError
from ..options import Augment
from ..types import Preprocess
from .splits import UInt8Array, network_inputs

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_input(images: UInt8Array, prep: Preprocess) -> torch.Tensor:
    """Network inputs (N, C, H, W), float32, `(pixel / 255 - mean) / std`, of pixels (N, H, W, C).

    Raises:
        InputError: mean or std do not fit the channels.
    """
    return torch.from_numpy(network_inputs(images, prep))


def augmented(
    images: UInt8Array, prep: Preprocess, generator: torch.Generator, *, whole: int | None = None, first: int = 0
) -> torch.Tensor:
    """Network inputs of images varied as in training, see `varied`.

    Raises:
        InputError: an unknown augmentation, or mean or std do not fit the channels.
    """
    return to_input(varied(images, prep.augment, generator, whole=whole, first=first), prep)


def varied(
    images: UInt8Array, augment: str, generator: torch.Generator, *, whole: int | None = None, first: int = 0
) -> UInt8Array:
    """Pixels (n, H, W, C), each image varied by an augmentation; draws come from `generator` (on the CPU) alone.

    "crop-flip" and "shift" pad each side with H // 8 black pixels (0 before normalisation) and crop at a random place;
    "crop-flip" then mirrors every second image at random (the CIFAR recipe, He et al. 2015, section 4.2).

    Images that are a part of a batch of `whole`, beginning at `first` of it, are varied as in the whole batch.

    Raises:
        InputError: an unknown augmentation.
    """
    check_augment(augment)
    if augment == "none":
        return images
    n, height, width, _ = images.shape
    pad, count, part = height // 8, n if whole is None else whole, slice(first, first + n)
    top = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)[part]
    left = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)[part]
    columns = torch.arange(width).expand(n, width)
    if augment == "crop-flip":
        mirrored = torch.randint(0, 2, (count, 1), generator=generator)[part].bool()
        columns = torch.where(mirrored, width - 1 - columns, columns)
    rows = torch.arange(height) + top  # (N, H)
    padded = torch.from_numpy(np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
    which = torch.arange(n)[:, None, None]
    return padded[which, rows[:, :, None], (columns + left)[:, None, :]].numpy()


def check_augment(name: str) -> None:
    """Raises InputError unless `name` is an `Augment`."""
    if name not in tuple(Augment):
        expected = "one of " + ", ".join(Augment)
        raise InputError("unknown augmentation", found=repr(name), expected=expected, do="set --augment")
