"""Parameters and multiply-accumulates of a network."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from ..types import ModelCost
from .modes import borrowed


def cost_of(module: nn.Module, image_shape: tuple[int, int, int]) -> ModelCost:
    """Parameters (all of them, each once) and multiply-accumulates of Conv2d and Linear layers for one image (C, H, W).

    Layers are counted as often as the forward pass calls them as modules.
    """
    macs = 0

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(layer, nn.Conv2d):
            macs += output.numel() * (layer.in_channels // layer.groups) * layer.kernel_size[0] * layer.kernel_size[1]
        elif isinstance(layer, nn.Linear):
            macs += output.numel() * layer.in_features

    first = next(chain(module.parameters(), module.buffers()), None)
    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with borrowed(module), torch.inference_mode():
            module.eval()
            module(torch.zeros(1, *image_shape, device=None if first is None else first.device))
    finally:
        for hook in hooks:
            hook.remove()
    return ModelCost(sum(p.numel() for p in module.parameters()), macs)
