"""Photographs with handwritten digits in them, for detection and segmentation; made here, nothing is downloaded.

Backgrounds are crops of scikit-learn's two sample photographs, the digits are those of its `load_digits`. The digits are
shared out over the splits, so that no digit of a test image is in an image that a network was trained or chosen on.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.utils.data import Dataset

SIZE = 128  # pixels, height and width of an image
CLASSES = 10
MOST = 8  # boxes that a target has room for
DIGITS = {"train": slice(0, 1200), "search": slice(1200, 1400), "test": slice(1400, 1797)}  # of a shuffled `load_digits`
SEEDS = {"train": 1, "search": 2, "test": 3}
SMALLEST, LARGEST = 16, 48  # pixels, of a pasted digit
INK = 0.5  # a pixel belongs to a digit where the digit covers at least this much of it
CONTRAST = 60.0  # grey levels, at least, by which a digit is lighter than the background it is pasted on
GREY = np.array([0.299, 0.587, 0.114])

Split = Literal["train", "search", "test"]
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Images of one split with their targets; sample `i` depends on the split and on `i` alone, not on `count`.

    An image is a float32 tensor (3, 128, 128), roughly in [-2, 2]. Its target is one of:

    - "boxes": float32 (8, 5), a row (class, left, top, right, bottom) in pixels for every digit, the other rows -1;
    - "classes": int64 (128, 128), of each pixel: 0 for the background, 1 + digit else.
    """

    def __init__(self, split: Split, count: int, target: Literal["boxes", "classes"]) -> None:
        scenes = [_scene(split, index) for index in range(count)]
        self._images = torch.from_numpy(np.stack([image for image, _, _ in scenes]).transpose(0, 3, 1, 2).copy())
        self._targets = torch.from_numpy(np.stack([boxes if target == "boxes" else classes for _, boxes, classes in scenes]))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        target = self._targets[index]
        return _normalised(self._images[index]), target.clone() if target.is_floating_point() else target.long()


class Closeups(Dataset[tuple[Tensor, int]]):
    """Parts (3, 48, 48) of the images of a split, each with a digit in it, and its class: what backbones are trained on first."""

    def __init__(self, split: Split, scenes: int) -> None:
        self._images, self._classes = [], []
        for image, boxes, _ in (_scene(split, index) for index in range(scenes)):
            rows = boxes[boxes[:, 0] >= 0]
            corners = ((rows[:, 1:3] + rows[:, 3:5] - LARGEST) // 2).clip(0, SIZE - LARGEST).astype(int)
            for label, (x, y) in zip(rows[:, 0], corners, strict=True):
                part = image[y : y + LARGEST, x : x + LARGEST].transpose(2, 0, 1).copy()
                self._images.append(torch.from_numpy(part))
                self._classes.append(int(label))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return _normalised(self._images[index]), self._classes[index]


def _normalised(pixels: Tensor) -> Tensor:
    """What a network takes: float32."""
    return (pixels.float() - 127.5) / 64.0


@cache
def _sources() -> tuple[list[Pixels], Floats, NDArray[np.int64]]:
    """The photographs (H, W, 3), the digits (n, 8, 8) from 0 to 1, and their classes (n,)."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    return load_sample_images().images, digits.images[order] / 16.0, digits.target[order]


def _scene(split: Split, index: int) -> tuple[Pixels, NDArray[np.float32], Pixels]:
    """An image (128, 128, 3), its boxes (8, 5) and the class of each of its pixels (128, 128)."""
    photographs, digits, labels = _sources()
    rng = np.random.default_rng((SEEDS[split], index))
    image = _background(photographs[rng.integers(len(photographs))], rng)
    boxes = np.full((MOST, 5), -1.0, np.float32)
    classes = np.zeros((SIZE, SIZE), np.uint8)
    taken = np.zeros((SIZE, SIZE), bool)
    for row in range(int(rng.integers(1, 5))):
        which = int(rng.integers(DIGITS[split].start, DIGITS[split].stop))
        cover = _resized(digits[which], int(rng.integers(SMALLEST, LARGEST + 1)))
        place = _free_place(taken, len(cover), rng)
        if place is None:
            continue
        taken[place] = True
        image[place] += (rng.uniform(0.8, 1.0) * cover)[:, :, None] * (_colour(image[place], rng) - image[place])
        ink = cover >= INK
        classes[place][ink] = labels[which] + 1
        down, across = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        top, left = place[0].start, place[1].start
        boxes[row] = labels[which], left + across[0], top + down[0], left + across[-1] + 1, top + down[-1] + 1
    image += rng.normal(0.0, 4.0, image.shape)
    return image.clip(0, 255).round().astype(np.uint8), boxes, classes


def _background(photograph: Pixels, rng: np.random.Generator) -> Floats:
    """A square of random size and place, darkened, as (128, 128, 3)."""
    height, width, _ = photograph.shape
    side = int(rng.integers(SIZE, height))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float64) * rng.uniform(0.3, 0.7)


def _resized(digit: Floats, side: int) -> Floats:
    """How much a digit covers of each pixel (side, side), from 0 to 1."""
    image = Image.fromarray(digit.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64).clip(0.0, 1.0)


def _free_place(taken: NDArray[np.bool_], side: int, rng: np.random.Generator) -> tuple[slice, slice] | None:
    """Rows and columns of a square that hardly touches what is taken; None where ten tries found none."""
    for _ in range(10):
        top, left = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
        place = slice(top, top + side), slice(left, left + side)
        if taken[place].mean() < 0.05:
            return place
    return None


def _colour(background: Floats, rng: np.random.Generator) -> Floats:
    """A random colour (3,) that is lighter than the background."""
    while True:
        colour = rng.uniform(0.0, 255.0, 3)
        if (colour - background.mean((0, 1))) @ GREY >= CONTRAST:
            return colour
