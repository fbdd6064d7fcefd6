"""The embedded default: a residual network for scikit-learn's 8x8 digits, trained on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .accuracy import logits, top1
from .preprocess import augmented
from .types import Epoch, Preprocess

if TYPE_CHECKING:
    from .data import DataSet

MEAN = (0.305,)  # of the 1,797 scans, pixels in [0, 1]
STD = (0.376,)
AUGMENT = "shift"  # a mirrored digit is no digit

EPOCHS = 8
BATCH = 64
PEAK_LEARNING_RATE = 3e-3


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2015, figure 2); the shortcut projects where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Eight residual blocks, 32, 64 and 128 wide, on (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = nn.Sequential(Block(32, 32), Block(32, 32))
        self.layer2 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.layer3 = nn.Sequential(Block(64, 128, stride=2), Block(128, 128), Block(128, 128))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.fc(y.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def digits_resnet() -> nn.Module:
    """A residual network for inputs (N, 1, 8, 8) and 10 classes, with initial weights."""
    return DigitsResNet()


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

    The result depends on the architecture, the data, `prep`, `seed` and `epochs` alone: the weights are drawn anew first.
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
            search_top1 = top1(logits(module, data.search, prep), data.search.labels)
            progress(Epoch(epoch + 1, float(np.mean(losses)), search_top1, time.perf_counter() - start))
    module.eval()


def _draw_weights(module: nn.Module, seed: int) -> None:
    """Torch's own initial weights of every layer, from `seed`, without touching the process's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for layer in module.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
