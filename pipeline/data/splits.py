"""Images by split, calibration (train), search and test, and the one way from stored pixels to network inputs. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..signature import Crop
from ..types import DataInfo, Preprocess

UInt8Array = NDArray[np.uint8]
IntArray = NDArray[np.int64]


class ImageSource(Protocol):
    """A store of labelled images of one shape; reading is lazy."""

    @property
    def labels(self) -> IntArray:
        """Class numbers (N,)."""
        ...

    def read(self, indices: IntArray) -> UInt8Array:
        """Pixels (n, H, W, C) of the images at `indices`, in that order."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images held in memory."""

    images: UInt8Array  # (N, H, W, C)
    labels: IntArray  # (N,)

    def read(self, indices: IntArray) -> UInt8Array:
        """Pixels (n, H, W, C), a copy."""
        return self.images[indices]


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a source, in a fixed order."""

    source: ImageSource
    indices: IntArray  # into the source

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> IntArray:
        """Class numbers (n,) in the split's order."""
        return self.source.labels[self.indices]

    def read(self, positions: IntArray) -> UInt8Array:
        """Pixels (n, H, W, C) of the images at `positions` within the split."""
        return self.source.read(self.indices[positions])

    def held(self, most_bytes: int) -> Split:
        """The same images, read once and kept in memory, where their pixels take at most so many bytes; else the split itself."""
        if isinstance(self.source, ArraySource) or not len(self) or self.read(np.arange(1)).nbytes * len(self) > most_bytes:
            return self
        return Split(ArraySource(self.read(np.arange(len(self))), self.labels), np.arange(len(self)))

    def head(self, n: int) -> Split:
        """The first `n` images; the order of train and search is a seeded shuffle, so this is a fair sample."""
        return replace(self, indices=self.indices[: max(n, 0)])


@dataclass(frozen=True, eq=False)
class DataSet:
    """Three disjoint splits and what is known of them."""

    info: DataInfo
    train: Split
    search: Split
    test: Split
    notes: tuple[str, ...] = ()  # how the images were read, where that was a choice


class SourceData(NamedTuple):
    """A data set before it is split."""

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (C, H, W)
    sha256: str
    train: ImageSource
    test: ImageSource | None = None  # None: a fifth of `train`, cut with `test_seed` or else with the run's seed
    test_seed: int | None = None
    crop: Crop | None = None  # image folders
    notes: tuple[str, ...] = ()  # how the images were read, where that was a choice


def network_inputs(pixels: UInt8Array, prep: Preprocess) -> NDArray[np.float32]:
    """Network inputs (n, C, H, W), `(pixel / 255 - mean) / std` in float32, of pixels (n, H, W, C).

    Raises:
        InputError: mean or std do not fit the channels.
    """
    n, height, width, channels = pixels.shape
    if len(prep.mean) != channels or len(prep.std) != channels:
        found = f"{len(prep.mean)} means and {len(prep.std)} deviations"
        raise InputError("mean and std", found=found, expected=f"{channels} of each, one per channel", do="set --mean and --std")
    mean, std = (np.array(values, np.float32)[:, None] for values in (prep.mean, prep.std))
    table = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std  # (C, 256): a pixel has no other values
    inputs = np.empty((n, channels, height, width), np.float32)
    for channel in range(channels):
        np.take(table[channel], pixels[..., channel], out=inputs[:, channel], mode="clip")  # "raise" would copy the output
    return inputs
