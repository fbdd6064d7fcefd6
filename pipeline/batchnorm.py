"""BatchNorm statistics of a network whose weights were changed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .accuracy import borrowed
from .preprocess import augmented
from .types import Preprocess

if TYPE_CHECKING:
    from .data import Split


def reestimate_batchnorm(
    module: nn.Module,
    split: Split,
    prep: Preprocess,
    *,
    images: int = 2000,
    seed: int,
    batch: int = 250,
    device: str = "cpu",
) -> None:
    """Running means and variances of every BatchNorm layer, estimated anew in place; nothing else of the module changes.

    They become the plain average over batches (`momentum=None`) of the first `images` images, varied by `prep.augment`: on
    plain images a network that was trained on varied ones loses points. All other layers are in eval mode meanwhile, so
    dropout is off. Depends on the network, the images, `batch` and `seed` alone. A network without BatchNorm is left as it is.

    Args:
        module: is back on its device and in its modes afterwards.
        split: training images, in an order whose head is a fair sample.
        prep: mean, std and the augmentation that the network was trained with.
        images: how many; all, where the split has fewer.
        seed: of the augmentation.
        batch: images in a batch, at most.
        device: where it is computed.
    """
    count = min(images, len(split))
    generator = torch.Generator().manual_seed(seed)
    # batches of nearly one size, since each counts the same in the average
    parts = np.array_split(np.arange(count), -(-count // batch)) if count else []
    with borrowed(module, device):
        reestimate_on(module, (augmented(split.read(part), prep, generator).to(device) for part in parts))


def reestimate_on(module: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """The same on inputs (n, C, H, W) that are made already, on the module's device. Without a batch nothing changes."""
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
