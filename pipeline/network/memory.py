"""What fits in memory: batches by the activations they take, and how many results are kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calling import Inputs, call
from .compute import Compute

ENOUGH_BYTES = 1 << 30  # of activations: a larger batch is not faster on a CPU
LEAST_MICRO_BATCH = 4  # samples: BatchNorm takes a variance over them
ANSWERED = 1 << 22  # input elements of an inference batch
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=tuple[Tensor, ...])


class TensorCache(Generic[Key, Value]):
    """Tensors that took long to compute, within a bound on memory: the least recently used are dropped first.

    Args:
        most_bytes: of all tensors together; the last result is kept however large it is.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._held: dict[Key, Value] = {}  # the least recently used first

    def get(self, key: Key, compute: Callable[[], Value]) -> Value:
        """Returns what `compute` returned for this key, or computes it again."""
        found = self._held.pop(key, None)
        if found is None:
            found = compute()
            self._bytes += _bytes(found)
        self._held[key] = found
        while self._bytes > self._most and len(self._held) > 1:
            self._bytes -= _bytes(self._held.pop(next(iter(self._held))))
        return found


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def saved_activation_bytes(module: nn.Module, sample: Inputs) -> int:
    """Returns the bytes that autograd saves for the backward pass, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs: Any = call(module, sample)
    assert outputs  # keeps the graph alive: a freed storage's address could be reused
    return sum(kept.values())


def backward_batch_size(module: nn.Module, inputs: Inputs, compute: Compute, most: int) -> int:
    """Returns the batch size for forward and backward passes.

    Args:
        module: the network, eval mode.
        inputs: of at least one sample.
        compute: limits the memory; on the CPU `ENOUGH_BYTES` does too.
        most: largest batch size.
    """
    first = next(module.parameters())
    one = pytree.tree_map_only(Tensor, lambda t: t[:1].to(first.device), inputs)
    bound = compute.memory_bytes // 4
    if compute.device == "cpu":
        bound = min(bound, ENOUGH_BYTES)
    return max(1, min(most, bound // max(1, 2 * saved_activation_bytes(module, one))))


def micro_batch_size(module: nn.Module, sample: Inputs, batch: int, memory_bytes: int) -> int | None:
    """Returns the samples of a training step's forward and backward pass, a power of two; None where the whole batch fits.

    Args:
        module: the network, eval mode.
        sample: one.
        batch: samples of an optimizer step.
        memory_bytes: that activations and their gradients may take.
    """
    most = memory_bytes // max(1, 2 * saved_activation_bytes(module, sample))
    return None if most >= batch else max(LEAST_MICRO_BATCH, 1 << max(0, most.bit_length() - 1))


def inference_batch_size(elements: int, most: int) -> int:
    """Returns the batch size, at most `most`, for inference on samples of so many input elements."""
    return max(1, min(most, ANSWERED // max(1, elements)))
