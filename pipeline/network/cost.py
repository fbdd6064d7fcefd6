"""Parameters and multiply-accumulates of a network."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..types import ModelCost
from .calling import Inputs, call, moved
from .modes import borrowed

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def cost_of(module: nn.Module, example: Inputs) -> ModelCost:
    """Parameters (all of them, each once) and multiply-accumulates of convolutions and linear layers for one sample.

    Layers are counted as often as the forward pass calls them as modules.
    """
    macs = 0

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            macs += output.numel() * (layer.in_channels // layer.groups) * math.prod(layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            macs += output.numel() * layer.in_features

    first = next(chain(module.parameters(), module.buffers()), None)
    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, LAYERS)]
    try:
        with borrowed(module), torch.inference_mode():
            module.eval()
            call(module, example if first is None else moved(example, str(first.device)))
    finally:
        for hook in hooks:
            hook.remove()
    return ModelCost(sum(p.numel() for p in module.parameters()), macs)
