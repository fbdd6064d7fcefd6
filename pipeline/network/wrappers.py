"""Takes off what training scripts put around a network."""

from __future__ import annotations

from torch import nn


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
