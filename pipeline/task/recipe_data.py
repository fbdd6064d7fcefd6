"""A recipe's data sets as `Samples`: the user's samples, collated, varied and checked."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from ..data.code_digest import Content
from ..data.datasets import MIN_TRAIN, search_size
from ..errors import InputError
from ..network.calling import Inputs
from .recipe import SPLITS, Recipe
from .samples import HELD_BYTES, Batch, Data

HELD_SAMPLES = 20_000
DIGESTED, DIGESTED_MOST, DIGESTED_BYTES = 64, 1024, 64 << 20  # of a split, that tell it apart besides the recipe's own code
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of a batch: collated for the loss, and each by itself for the metric. None where there are none."""

    collated: Any
    each: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class RecipeSamples:
    """Samples of one of a recipe's data sets; targets are `Targets`."""

    recipe: Recipe
    dataset: Any
    name: str  # of the split
    indices: IntArray
    kept: dict[int, Any] | None = None  # samples read before, by index
    names: list[str] = field(default_factory=list)  # of inputs by name, in the order of the first batch of any split

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def digest(self) -> str:
        """See `Samples.digest`; of samples spread evenly over the split, see `digested`."""
        found = hashlib.sha256(f"{self.recipe.digest} {self.name} {len(self.indices)}".encode() + self.indices.tobytes())
        content = Content()
        for position in self.digested:
            content.add(self._sample(int(self.indices[position])))
        found.update(content.hexdigest().encode())
        return found.hexdigest()

    @cached_property
    def digested(self) -> IntArray:
        """Positions of the samples that a data set is told apart by: all, if they are small, else at least 64."""
        if not len(self):
            return np.zeros(0, np.int64)
        count = min(len(self), DIGESTED_MOST, max(DIGESTED, DIGESTED_BYTES // self._bytes_each))
        return np.unique(np.linspace(0, len(self) - 1, count).round().astype(np.int64))

    def batch(self, positions: IntArray) -> Batch:
        """See `Samples.batch`."""
        return self._collated([self._sample(int(i)) for i in self.indices[positions]])

    def training_batch(self, positions: IntArray, generator: torch.Generator, whole: int | None = None, first: int = 0) -> Batch:
        """See `Samples.training_batch`. The recipe's `augment` may draw from torch's, numpy's and Python's own generators."""
        count = len(positions) if whole is None else whole
        seeds = torch.randint(0, 2**31, (count,), generator=generator)[first : first + len(positions)].tolist()
        samples = [self._sample(int(i)) for i in self.indices[positions]]
        augment = self.recipe.augment
        if augment is not None:
            varied = []
            with own_generators():
                for seed, (inputs, target) in zip(seeds, samples, strict=True):
                    _seed(seed)
                    with self.recipe.calling("augment()"):
                        varied.append(augment(*copied((inputs, target))))  # it may work in place
            if any(not isinstance(sample, tuple) or len(sample) != 2 for sample in varied):
                raise self.recipe.wrong("augment()", type(varied[0]).__name__, "(inputs, target)")
            samples = varied
        return self._collated(samples)

    def picked(self, positions: IntArray) -> RecipeSamples:
        """See `Samples.picked`."""
        return replace(self, indices=self.indices[positions])

    def held(self) -> RecipeSamples:
        """See `Samples.held`."""
        large = len(self) > HELD_SAMPLES or (len(self) > 0 and len(self) * self._bytes_each > HELD_BYTES)
        return self if large else replace(self, kept={})

    @cached_property
    def _bytes_each(self) -> int:
        """Bytes of the first sample."""
        content = Content()
        content.add(self._sample(int(self.indices[0])))
        return max(1, content.bytes)

    def _sample(self, index: int) -> tuple[Any, Any]:
        if self.kept is not None and index in self.kept:
            found: tuple[Any, Any] = self.kept[index]
            return found
        where = f"datasets()[{self.name!r}][{index}]"
        with self.recipe.calling(where):
            sample = self.dataset[index]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise self.recipe.wrong(where, type(sample).__name__, "(inputs, target)")
        if self.kept is not None:
            self.kept[index] = tuple(sample)
        return sample[0], sample[1]

    def _collated(self, samples: Sequence[tuple[Any, Any]]) -> Batch:
        inputs, target = self._collate(samples)
        each = tuple(self._collate([sample])[1] for sample in samples) if self.recipe.metric is not None else ()
        return Batch(inputs, Targets(target, each))

    def _collate(self, samples: Sequence[tuple[Any, Any]]) -> tuple[Inputs, Any]:
        function = "collate()" if self.recipe.collate is not None else f"datasets()[{self.name!r}]"
        with self.recipe.calling(function):
            if self.recipe.collate is not None:
                inputs, target = self.recipe.collate(copied(samples))
            else:
                inputs = default_collate([sample[0] for sample in samples])
                absent = all(sample[1] is None for sample in samples)
                target = None if absent else default_collate([sample[1] for sample in samples])
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        if isinstance(inputs, dict):  # artifacts take them by their places
            self.names.extend(() if self.names else inputs)
            if sorted(inputs) != sorted(self.names):
                raise self.recipe.wrong(function, f"inputs {', '.join(inputs)}", f"those of the others: {', '.join(self.names)}")
            inputs = {name: inputs[name] for name in self.names}
        leaves = list(inputs.values()) if isinstance(inputs, dict) else list(inputs) if isinstance(inputs, tuple) else [inputs]
        if not leaves or any(not isinstance(leaf, Tensor) or leaf.ndim < 1 or len(leaf) != len(samples) for leaf in leaves):
            found = ", ".join(f"{tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves)
            raise self.recipe.wrong(
                function, found or "no inputs", f"tensors, or a tuple or dict of tensors, the {len(samples)} samples along axis 0"
            )
        return inputs, target


def data_of(recipe: Recipe, seed: int) -> Data:
    """The three splits of a recipe's data; without a search split it is cut from the training samples.

    Raises:
        InputError: `datasets()` fails, or gives no data sets.
    """
    with recipe.calling("datasets()"):
        given = recipe.datasets()
    if not isinstance(given, dict):
        raise recipe.wrong("datasets()", f"a {type(given).__name__}", '{"train": D, "test": D} and perhaps "search"')
    for name in ("train", "test"):
        if name not in given:
            raise recipe.wrong("datasets()", ", ".join(map(repr, given)) or "nothing", f"a data set {name!r}")
    if unknown := [name for name in given if name not in SPLITS]:
        expected = f"{', '.join(map(repr, SPLITS))}: a validation set is 'search'"
        raise recipe.wrong("datasets()", f"a data set {unknown[0]!r}", expected)
    found, names = {}, list[str]()
    for name in (n for n in SPLITS if n in given):
        dataset = given[name]
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise recipe.wrong(f"datasets()[{name!r}]", f"a {type(dataset).__name__}", "a map-style data set: len() and [i]")
        with recipe.calling(f"len(datasets()[{name!r}])"):
            count = len(dataset)
        if count < (MIN_TRAIN if name == "train" else 1):
            raise recipe.wrong(f"datasets()[{name!r}]", f"{count} samples", f"at least {MIN_TRAIN if name == 'train' else 1}")
        found[name] = RecipeSamples(recipe, dataset, name, np.arange(count, dtype=np.int64), names=names)
    order = np.random.default_rng(seed).permutation(len(found["train"])).astype(np.int64)
    if "search" not in found:
        size = search_size(len(order))
        found["search"], order = replace(found["train"], indices=order[:size]), order[size:]
    return Data(replace(found["train"], indices=order), found["search"], found["test"])


def copied(value: Any) -> Any:
    """Returns nested tensors and arrays as copies: the user's functions may change what they are given."""
    return pytree.tree_map_only(
        Tensor | np.ndarray, lambda array: array.clone() if isinstance(array, Tensor) else array.copy(), value
    )


@contextmanager
def own_generators() -> Iterator[None]:
    """Torch's, numpy's and Python's random states are left as they were."""
    python, old = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(old)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


__all__ = ["InputError", "RecipeSamples", "Targets", "data_of"]
