"""Samples of any task by split, and which of them a stage sees: fixed, seeded draws from the training split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from ...targets.base import Arrays, Target
from ..data.preprocess import to_input, varied
from ..data.splits import DataSet, Split, UInt8Array
from ..network.calling import Inputs, arrays_of
from ..network.exact_mode import Batch as LabelledBatch
from ..types import Preprocess

SCORING_SAMPLES = 2000  # scores and moments are taken on
BATCH = 100
SET_BYTES = 5 << 28  # of the network inputs of a set of samples that is held at once: 2,000 images at 224 pixels
LEAST_HELD = 32  # samples
HELD_BYTES = 1 << 30  # of a split's pixels that are kept in memory between artifacts
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples: what the network takes, and what its task judges the outputs by."""

    inputs: Inputs
    targets: Any
    pixels: UInt8Array | None = None  # (n, H, W, C) of images that some artifacts take themselves

    @property
    def arrays(self) -> Arrays:
        """The inputs outside of torch."""
        return arrays_of(self.inputs)

    def artifact_inputs(self, target: Target) -> Arrays:
        """What a target's artifacts take."""
        return self.pixels if target.takes_pixels and self.pixels is not None else self.arrays


class Samples(Protocol):
    """Samples of a split, in a fixed order."""

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """SHA-256 of what they are and of their order."""
        ...

    def batch(self, positions: IntArray) -> Batch:
        """Samples as they are."""
        ...

    def training_batch(self, positions: IntArray, generator: torch.Generator, whole: int | None = None, first: int = 0) -> Batch:
        """Samples varied as in training; those that are a part of a batch of `whole`, from `first` on, as in the whole one."""
        ...

    def picked(self, positions: IntArray) -> Samples:
        """The samples at these positions."""
        ...

    def held(self) -> Samples:
        """The same samples, read once where they fit into memory."""
        ...


@dataclass(frozen=True, eq=False)
class ImageSamples:
    """Labelled images of a split; targets are class numbers (n,)."""

    split: Split
    prep: Preprocess
    sha256: str = ""  # of the data set

    def __len__(self) -> int:
        return len(self.split)

    @cached_property
    def digest(self) -> str:
        """See `Samples.digest`."""
        return hashlib.sha256(f"{self.sha256} {self.prep}".encode() + self.split.indices.tobytes()).hexdigest()

    def batch(self, positions: IntArray) -> Batch:
        """See `Samples.batch`."""
        return self._batch(self.split.read(positions), positions)

    def training_batch(self, positions: IntArray, generator: torch.Generator, whole: int | None = None, first: int = 0) -> Batch:
        """See `Samples.training_batch`."""
        pixels = varied(self.split.read(positions), self.prep.augment, generator, whole=whole, first=first)
        return self._batch(pixels, positions)

    def picked(self, positions: IntArray) -> ImageSamples:
        """See `Samples.picked`."""
        return replace(self, split=replace(self.split, indices=self.split.indices[positions]))

    def held(self) -> ImageSamples:
        """See `Samples.held`."""
        return replace(self, split=self.split.held(HELD_BYTES))

    def _batch(self, pixels: UInt8Array, positions: IntArray) -> Batch:
        labels = self.split.source.labels[self.split.indices[positions]]
        return Batch(to_input(pixels, self.prep), torch.from_numpy(labels), pixels)


@dataclass(frozen=True, eq=False)
class Data:
    """Three disjoint splits."""

    train: Samples
    search: Samples
    test: Samples


def image_data(data: DataSet, prep: Preprocess) -> Data:
    """A data set of images with the way from its pixels to network inputs."""
    return Data(*(ImageSamples(split, prep, data.info.sha256) for split in (data.train, data.search, data.test)))


def head(samples: Samples, count: int) -> Samples:
    """The first samples, at most `count`; the order of train and search is a seeded shuffle, so this is a fair draw."""
    return samples.picked(np.arange(min(max(count, 0), len(samples))))


def held_at_once(samples: Samples, wanted: int, most_bytes: int | None = None, besides: int = 0) -> int:
    """How many samples are held at once: at most `wanted`, and at least 32 of them.

    Args:
        samples: to choose from.
        wanted: samples that would be enough.
        most_bytes: that they may take together; None: `SET_BYTES`.
        besides: bytes that are held for each besides its network inputs.
    """
    wanted = min(wanted, len(samples))
    if wanted <= LEAST_HELD:
        return wanted
    inputs = pytree.tree_leaves(samples.batch(np.arange(1)).inputs)
    each = max(1, besides + sum(int(tensor.nbytes) for tensor in inputs))
    return min(wanted, max(LEAST_HELD, (SET_BYTES if most_bytes is None else most_bytes) // each))


def training_batch(train: Samples, count: int, seed: int) -> Batch:
    """The first `count` training samples, varied as in training."""
    return train.training_batch(np.arange(min(count, len(train))), torch.Generator().manual_seed(seed))


def training_inputs(train: Samples, count: int, seed: int) -> Inputs:
    """The network inputs of `training_batch`."""
    return training_batch(train, count, seed).inputs


def scoring_inputs(train: Samples, seed: int) -> Inputs:
    """Training samples that scores and moments are taken on."""
    return training_inputs(train, held_at_once(train, SCORING_SAMPLES), seed)


def batches(inputs: torch.Tensor, size: int = BATCH) -> list[LabelledBatch]:
    """Network inputs (n, C, H, W) in batches for a curvature that asks for no labels."""
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in torch.split(inputs, size)]


def calibration_set(train: Samples, target: Target | None, count: int, seed: int, batch: int = 50) -> Sequence[Arrays]:
    """The calibration set in batches: training samples, varied as in training, as a target's artifacts take them.

    Without a target: as the network takes them.
    """
    drawn = training_batch(train, held_at_once(train, count), seed)
    whole = arrays_of(drawn.inputs) if target is None else drawn.artifact_inputs(target)
    if not isinstance(whole, tuple):
        return [whole[at : at + batch] for at in range(0, len(whole), batch)]
    return [tuple(array[at : at + batch] for array in whole) for at in range(0, len(whole[0]), batch)]
