"""Calls a network with inputs of any shape: one tensor, several by position, or several by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...targets.base import Arrays

Inputs = Any  # a tensor, or a tuple or dict of tensors; the samples along axis 0
Outputs = tuple[Tensor, ...]  # in the order of the signature

SAME = 1e-3  # deviation that rounding in float32 may cause, such as with another batch size


def fresh(inputs: Inputs) -> Inputs:
    """A copy of network inputs, however nested: networks may overwrite them, to normalise in place for one."""
    return pytree.tree_map_only(Tensor, torch.clone, inputs)


def call(module: nn.Module, inputs: Inputs) -> Outputs:
    """The outputs of a network that gives a tensor or a tuple of tensors."""
    own = fresh(inputs)
    named = own if isinstance(own, dict) else {}
    found = module(*(() if named else own if isinstance(own, tuple) else (own,)), **named)
    return found if isinstance(found, tuple) else (found,)


def in_float(output: Tensor) -> Tensor:
    """A floating output in float32; class numbers and masks as they are, as an artifact gives them."""
    return output.float() if output.is_floating_point() else output


def count_of(inputs: Inputs) -> int:
    """Number of samples in network inputs."""
    return len(pytree.tree_leaves(inputs)[0])


def elements_of(inputs: Inputs) -> int:
    """Elements of one sample of network inputs."""
    return sum(tensor[0].numel() for tensor in pytree.tree_leaves(inputs))


def moved(inputs: Inputs, device: str, layout: torch.memory_format | None = None) -> Inputs:
    """The inputs on a device; images (n, C, H, W) in a memory format."""

    def move(tensor: Tensor) -> Tensor:
        if layout is None or tensor.ndim != 4:
            return tensor.to(device)
        return tensor.to(device, memory_format=layout)

    return pytree.tree_map_only(Tensor, move, inputs)


def answers_in_parts(module: nn.Module, inputs: Inputs, batch: int, device: str = "cpu") -> Outputs:
    """The outputs for many inputs, on the CPU in float, computed in batches."""
    parts = []
    for start in range(0, count_of(inputs), batch):
        stop = start + batch
        part = pytree.tree_map_only(Tensor, partial(_slice, start=start, stop=stop, device=device), inputs)
        parts.append(tuple(in_float(output).cpu() for output in call(module, part)))
    return tuple(torch.cat(same) for same in zip(*parts, strict=True))


def deviation(one: Tensor, other: Tensor, of: Tensor) -> float:
    """Returns the largest difference of two outputs of the same shape, relative to the range of `of`."""
    of = of.float()  # bool has no difference
    span = float(of.max() - of.min()) or 1.0 if of.numel() else 1.0
    return float((one.float() - other.float()).abs().max()) / span


def _slice(tensor: Tensor, start: int, stop: int, device: str) -> Tensor:
    return tensor[start:stop].to(device)


def arrays_of(inputs: Inputs) -> Arrays:
    """Network inputs as arrays, several of them in their order."""
    leaves = tuple(tensor.numpy() for tensor in pytree.tree_leaves(inputs))
    return leaves if isinstance(inputs, tuple | dict) else leaves[0]


def tensors_of(arrays: Arrays) -> Outputs:
    """An artifact's outputs as tensors."""
    each: Sequence[NDArray[Any]] = arrays if isinstance(arrays, tuple) else (arrays,)
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in each)


def per_sample(function: Callable[[Tensor, Tensor], Tensor], one: Outputs, other: Outputs) -> Tensor:
    """The mean over outputs of a figure (n,) that compares two networks' outputs, each as (n, elements)."""
    pairs = [(a.flatten(1), b.flatten(1)) if a.ndim > 1 else (a[:, None], b[:, None]) for a, b in zip(one, other, strict=True)]
    return torch.stack([function(a.double(), b.double()) for a, b in pairs]).mean(0)
