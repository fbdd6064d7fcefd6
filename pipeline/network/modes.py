"""Borrows a module: its device and its train/eval modes come back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    pass


@contextmanager
def borrowed(module: nn.Module, device: str | None = None) -> Iterator[None]:
    """Work with a module on `device` (None: where it is), its modes free to change; device and modes are as before afterwards."""
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
