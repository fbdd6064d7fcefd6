"""BatchNorm statistics as the plain average over batches: what methods without `match_moments` do after pruning."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from edge_compress.pipeline.network.modes import borrowed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def reestimate_on(module: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Re-estimate running means and variances of every BatchNorm layer in place; nothing else of the module changes.

    They become the plain average over batches (`momentum=None`). All other layers are in eval mode meanwhile, so dropout is off.

    Args:
        module: is back in its modes afterwards; a network without BatchNorm is left as it is.
        batches: inputs (n, C, H, W) on the module's device, varied as in training: on plain images a network that was trained on
            varied ones loses points. Without a batch nothing changes.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    rest = iter(batches)
    first = next(rest, None) if layers else None
    if first is None:
        return
    momenta = [layer.momentum for layer in layers]
    with borrowed(module), torch.no_grad():
        module.eval()
        try:
            for layer in layers:
                layer.train()
                layer.momentum = None  # the average over all batches, whatever their order
                layer.reset_running_stats()
            for inputs in chain((first,), rest):
                module(inputs)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
