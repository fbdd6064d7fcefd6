"""Logits of a classifier in PyTorch on a split of images, and top-1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..data.splits import Split, network_inputs
from ..types import Preprocess

if TYPE_CHECKING:
    import torch
    from torch import nn


def logits(
    module: nn.Module,
    split: Split,
    prep: Preprocess,
    *,
    device: str = "cpu",
    batch: int = 100,
    layout: torch.memory_format | None = None,
) -> NDArray[np.float32]:
    """Logits (N, classes) of every image of `split`, un-augmented and in order, in eval mode; device and modes are restored.

    On a CPU a batch of about a hundred small images stays in its cache, and channels-last is the faster layout where the module
    can take it (`memory_layout.layout_for`).

    Raises:
        ValueError: the split is empty.
    """
    import torch

    from ..network.modes import borrowed

    if len(split) == 0:
        raise ValueError("a split without images has no logits")
    outputs = []
    with borrowed(module, device), torch.inference_mode():
        module.eval()
        for first in range(0, len(split), batch):
            images = split.read(np.arange(first, min(first + batch, len(split))))
            inputs = torch.from_numpy(network_inputs(images, prep))
            inputs = inputs.to(device, memory_format=torch.preserve_format if layout is None else layout)
            outputs.append(module(inputs).float().cpu().numpy())
    return np.concatenate(outputs)


def top1(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Top-1 accuracy in percent of logits (N, classes) against labels (N,). A row with a NaN counts as wrong.

    Raises:
        ValueError: no rows, or another number of labels than rows.
    """
    if len(logits) != len(labels) or len(labels) == 0:
        raise ValueError(f"{len(logits)} rows of logits and {len(labels)} labels")
    return 100.0 * float((predictions(logits) == labels).mean())


def predictions(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The class (N,) of every row (N, classes); -1, which is none, for a row with a NaN in it."""
    # argmax takes a NaN for the largest, and so a broken network's answer for a class
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))
