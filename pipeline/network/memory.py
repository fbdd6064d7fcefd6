"""How many samples a network takes at once, by what their activations need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calling import Inputs, call
from .compute import Compute

ENOUGH_BYTES = 1 << 30  # of activations at once: on a processor more makes nothing faster
ANSWERED = 1 << 22  # elements of the inputs that are answered at once, without gradients


def backward_bytes(module: nn.Module, sample: Inputs) -> int:
    """Returns the bytes that autograd keeps of a forward pass on these inputs, parameters and buffers apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs: Any = call(module, sample)
    assert outputs  # alive until here, or a storage could be counted twice under one address
    return sum(kept.values())


def differentiated_at_once(module: nn.Module, inputs: Inputs, compute: Compute, most: int) -> int:
    """Returns how many samples, at most `most`, go through a backward pass at once.

    Args:
        module: the network, eval mode.
        inputs: of at least one sample.
        compute: its memory is used, on a processor up to `ENOUGH_BYTES`.
        most: samples.
    """
    first = next(module.parameters())
    one = pytree.tree_map_only(Tensor, lambda t: t[:1].to(first.device), inputs)
    bound = compute.memory_bytes // 4
    if compute.device == "cpu":
        bound = min(bound, ENOUGH_BYTES)
    return max(1, min(most, bound // max(1, 2 * backward_bytes(module, one))))


def answered_at_once(elements: int, most: int) -> int:
    """Returns how many samples of so many input elements, at most `most`, are answered at once."""
    return max(1, min(most, ANSWERED // max(1, elements)))
