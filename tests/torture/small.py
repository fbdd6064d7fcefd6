"""A network of one residual block, as a user's model file and as a recipe; weights and data lie beside the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

HERE = Path(__file__).parent
MEAN, STD = (0.305,), (0.376,)


class Small(nn.Module):
    """For 8x8 grey images of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.first, self.first_norm = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.second, self.second_norm = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.classes = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.second_norm(self.second(F.relu(self.first_norm(self.first(x))))))
        return self.classes(x.mean(dim=(2, 3)))


def network() -> nn.Module:
    """The factory of `--model small.py:network`."""
    return Small()


def model() -> nn.Module:
    """The recipe's trained network."""
    made = Small()
    made.load_state_dict(load_file(HERE / "small.safetensors"))
    return made.eval()


def datasets() -> dict[str, TensorDataset]:
    """The recipe's splits."""
    with np.load(HERE / "small.npz") as data:
        return {name: _split(data[f"{name}_images"], data[f"{name}_labels"]) for name in ("train", "test")}


def _split(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return TensorDataset((pixels - MEAN[0]) / STD[0], torch.from_numpy(labels))


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target)


class metric:
    """The share of right answers."""

    name, unit, higher_is_better = "right", "%", True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._right: list[bool] = []

    def update(self, outputs: Tensor, target: Tensor) -> None:
        self._right.append(int(outputs.reshape(-1).argmax()) == int(target))

    def compute(self) -> float:
        return 100.0 * sum(self._right) / max(len(self._right), 1)
