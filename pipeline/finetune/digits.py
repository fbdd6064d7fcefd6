"""Trains the embedded network for scikit-learn's digits."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..data.preprocess import augmented
from ..data.splits import DataSet
from ..data.user_code import own_randomness
from ..task.inference import logits, top1
from ..types import Epoch, Preprocess

EPOCHS = 8
BATCH = 64
PEAK_LEARNING_RATE = 3e-3


def train_digits(
    module: nn.Module,
    data: DataSet,
    prep: Preprocess,
    seed: int,
    *,
    epochs: int = EPOCHS,
    progress: Callable[[Epoch], None] | None = None,
) -> None:
    """Train `module` in place on the train split: AdamW, one-cycle learning rate, images varied by `prep.augment`.

    The result depends on the architecture, the data, `prep`, `seed` and `epochs` alone: the weights are re-initialised first.
    `progress` gets each epoch with its top-1 on the search split. The module is in eval mode afterwards.
    """
    _draw_weights(module, seed)
    generator = torch.Generator().manual_seed(seed)
    images = data.train.read(np.arange(len(data.train)))
    labels = torch.from_numpy(data.train.labels)
    steps = epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        module.train()
        order = torch.randperm(len(labels), generator=generator)
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            outputs = module(augmented(images[chosen.numpy()], prep, generator))
            loss = F.cross_entropy(outputs, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        module.eval()
        if progress is not None:
            value = top1(logits(module, data.search, prep), data.search.labels)
            progress(Epoch(epoch + 1, float(np.mean(losses)), value, time.perf_counter() - start))
    module.eval()


def _draw_weights(module: nn.Module, seed: int) -> None:
    """Torch's own initial weights of every layer, from `seed`, without touching the process's random state."""
    with own_randomness(seed):
        for layer in module.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
