"""A recipe with two inputs by name, one of them of whole numbers, and two outputs, as a file that can be run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WORDS = 12


class TwoEnded(nn.Module):
    """An image and words go in; where the image's square is, and what the words say it is, come out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 16, 3, padding=1))
        self.read = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.place, self.kind = nn.Conv2d(16, 1, 1), nn.Linear(32, 3)

    def forward(self, image: Tensor, words: Tensor) -> dict[str, Tensor]:
        """{"place": (n, 1, 8, 8), "kind": (n, 3)}."""
        seen = self.stem(image)
        seen = seen + self.body(seen)
        told = self.read(self.words(words).mean(1))
        return {"place": self.place(seen), "kind": self.kind(torch.cat([seen.mean((2, 3)), told], 1))}


class Squares:
    """Images with a bright square, words that all mean one of three kinds, and both answers."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rng = np.random.default_rng((self._seed, index))
        kind, (x, y) = int(rng.integers(3)), rng.integers(0, 6, 2)
        image = rng.normal(0, 0.3, (1, 8, 8)).astype(np.float32)
        image[0, y : y + 3, x : x + 3] += 1.5
        where = np.zeros((1, 8, 8), np.float32)
        where[0, y : y + 3, x : x + 3] = 1.0
        words = torch.from_numpy(rng.integers(4 * kind, 4 * kind + 4, 5))
        inputs = {"image": torch.from_numpy(image), "words": words}
        return inputs, {"place": torch.from_numpy(where), "kind": torch.tensor(kind)}


def model() -> TwoEnded:
    """Trained in seconds."""
    torch.manual_seed(0)
    network, data = TwoEnded(), Squares(256, 1)
    parts = [data[i] for i in range(len(data))]
    inputs = {key: torch.stack([given[key] for given, _ in parts]) for key in ("image", "words")}
    target = {key: torch.stack([wanted[key] for _, wanted in parts]) for key in ("place", "kind")}
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss(network(**inputs), target).backward()
        optimizer.step()
    return network.eval()


def datasets() -> dict[str, Squares]:
    """The splits."""
    return {"train": Squares(200, 2), "search": Squares(80, 3), "test": Squares(120, 4)}


def loss(outputs: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Of both answers."""
    place = nn.functional.binary_cross_entropy_with_logits(outputs["place"], target["place"])
    return place + nn.functional.cross_entropy(outputs["kind"], target["kind"])


class Both:
    """The share of samples of which both answers are right."""

    name, unit, higher_is_better = "both right", "%", True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all."""
        self._right: list[float] = []

    def update(self, outputs: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        """One sample."""
        found, wanted = outputs["place"][0] > 0, target["place"] > 0.5
        overlap = (found & wanted).sum() / (found | wanted).sum().clamp_min(1)
        self._right.append(100.0 * float(overlap > 0.6 and int(outputs["kind"].argmax()) == int(target["kind"])))

    def compute(self) -> float:
        """The share so far."""
        return float(np.mean(self._right))


def picture(inputs: dict[str, Tensor], outputs: dict[str, Tensor], target: Any) -> np.ndarray[Any, Any]:
    """Where the square was found."""
    found = (outputs["place"][0, 0].sigmoid() * 255).byte().numpy()
    return np.repeat(found[:, :, None], 3, axis=2)


metric = Both
