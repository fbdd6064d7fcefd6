"""What a PyTorch network answers, how often it is right, and what it costs on paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .preprocess import to_input
from .types import ModelCost, Preprocess

if TYPE_CHECKING:
    from .data import Split


def logits(
    module: nn.Module,
    split: Split,
    prep: Preprocess,
    *,
    device: str = "cpu",
    batch: int = 100,
    layout: torch.memory_format = torch.contiguous_format,
) -> NDArray[np.float32]:
    """Outputs (N, classes) of every image of `split`, un-augmented and in order, in eval mode.

    The module comes back on the device and in the modes (train or eval, of each submodule) it was in.

    Args:
        module: gives logits (N, classes).
        split: not empty.
        prep: mean and std.
        device: where it is computed.
        batch: images at a time; on a CPU about a hundred small ones stay in its cache.
        layout: how images lie in memory; channels-last is the faster order on a CPU, where the module can take it
            (`memory_layout.layout_for`).

    Raises:
        ValueError: the split is empty.
    """
    if len(split) == 0:
        raise ValueError("a split without images has no logits")
    outputs = []
    with borrowed(module, device), torch.inference_mode():
        module.eval()
        for first in range(0, len(split), batch):
            images = split.read(np.arange(first, min(first + batch, len(split))))
            inputs = to_input(images, prep).to(device, memory_format=layout)
            outputs.append(module(inputs).float().cpu().numpy())
    return np.concatenate(outputs)


def top1(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Percent of rows (N, classes) whose largest value stands at the label (N,). A row with a NaN in it is wrong.

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
