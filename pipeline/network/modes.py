"""Restores a module's device and train/eval modes after use; plain attention; unwraps torch.compile and DataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import fx, nn


@contextmanager
def borrowed(module: nn.Module, device: str | None = None) -> Iterator[None]:
    """Moves a module to `device` (None: where it is) inside, its modes free to change; restores device and modes."""
    first = next(chain(module.parameters(), module.buffers()), None)
    home = None if first is None else first.device
    modes = {layer: layer.training for layer in module.modules()}
    moved = device is not None and home is not None and torch.device(device) != home
    try:
        if moved:
            module.to(device)
        yield
    finally:
        if moved:
            module.to(home)
        for layer, training in modes.items():
            layer.training = training


@contextmanager
def attention_in_steps() -> Iterator[None]:
    """nn.MultiheadAttention as the operators it consists of, not as one fused for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Returns the network inside torch.compile, DataParallel or DistributedDataParallel, and the names of these classes."""
    taken: list[str] = []
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module, taken
        taken.append(type(module).__name__)
        module = inner


def unusable(module: nn.Module) -> tuple[str, str]:
    """Returns what keeps a network from being moved or put into eval mode, and what to do; ("", "") where nothing does."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if meta := [name for name, tensor in tensors if tensor.is_meta]:
        return f"{meta[0]}, a tensor on the meta device", "make the network on the CPU, so that its tensors have values"
    # torch.export puts functions that raise in place of `train` and `eval`
    if any(isinstance(part, fx.GraphModule) and "eval" in vars(part) for part in module.modules()):
        return "an exported program", "return the module it was exported from"
    return "", ""
