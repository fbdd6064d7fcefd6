"""Trains the network of an example from scratch and writes its weights; about 12 minutes each, on one core of a server.

    python examples/train.py detect
    python examples/train.py segment

The backbone first learns to tell digits apart in close-ups, which is a tenth of the work and shortens the rest; then the whole
network is trained with the recipe's loss on whole scenes. Interrupted, the same command goes on after the last finished epoch.
"""

from __future__ import annotations

import argparse
import importlib
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from detector import Detector
from safetensors.torch import save_file
from scenes import CLASSES, Closeups, Scenes
from segmenter import Segmenter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

WEIGHTS = Path(__file__).parent / "weights"
SCENES = 5000  # the train split of the recipes
CLOSEUP_EPOCHS = 4
BATCH, RATE, DECAY, WARMUP, LARGEST_GRADIENT, SEED = 16, 2e-3, 0.02, 0.05, 10.0, 0
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Example:
    """What is trained, on which targets, and for how long."""

    network: type[Detector] | type[Segmenter]
    target: Literal["boxes", "classes"]
    epochs: int


EXAMPLES = {"detect": Example(Detector, "boxes", 6), "segment": Example(Segmenter, "classes", 4)}


class Classifier(nn.Module):
    """A network's backbone with one linear layer on the means of its features."""

    def __init__(self, network: Detector | Segmenter) -> None:
        super().__init__()
        self.network = network
        self.last = nn.Linear(sum(part.shape[1] for part in network.eval().features(torch.zeros(1, 3, 32, 32))), CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        logits: Tensor = self.last(torch.cat([part.mean((2, 3)) for part in self.network.features(images)], 1))
        return logits


def train(name: str) -> nn.Module:
    """The trained network of an example; every epoch ends with a checkpoint, which a later call goes on from."""
    example, recipe = EXAMPLES[name], importlib.import_module(name)
    torch.manual_seed(SEED)
    network = example.network().to(memory_format=torch.channels_last)  # the faster layout
    checkpoint = _folder(name) / "checkpoint.pt"
    if not checkpoint.exists():
        classifier, closeups = Classifier(network), Closeups("train", SCENES)
        optimizer = _optimizer(classifier)
        for epoch in range(CLOSEUP_EPOCHS):
            error = _epoch(classifier, optimizer, closeups, F.cross_entropy, epoch, CLOSEUP_EPOCHS)
            print(f"close-ups, epoch {epoch + 1}/{CLOSEUP_EPOCHS}: loss {error:.3f}", flush=True)
        _save(checkpoint, network, _optimizer(network), 0)
    optimizer = _optimizer(network)
    state = torch.load(checkpoint, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    samples, search = Scenes("train", SCENES, example.target), Scenes("search", 300, example.target)
    for epoch in range(state["epochs"], example.epochs):
        error = _epoch(network, optimizer, samples, recipe.loss, epoch, example.epochs)
        _save(checkpoint, network, optimizer, epoch + 1)
        value = evaluated(network, search, recipe.metric())
        print(f"scenes, epoch {epoch + 1}/{example.epochs}: loss {error:.3f}, search split {value:.1f} %", flush=True)
    return network.eval()


def evaluated(network: nn.Module, samples: Scenes, metric: Any, batch: int = 50) -> float:
    """The metric's value over all samples; the network is in eval mode afterwards."""
    network.eval()
    with torch.inference_mode():
        for images, targets in DataLoader(samples, batch):
            metric.update(network(images), targets)
    return float(metric.compute())


def _folder(name: str) -> Path:
    """Where the checkpoint of an example is while it is trained."""
    return WEIGHTS / f"{name}.work"


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """A new one, for all of a module's weights."""
    return torch.optim.AdamW(module.parameters(), RATE, weight_decay=DECAY)


def _save(file: Path, network: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """Writes a checkpoint, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epochs}, part)
    part.replace(file)


def _epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, samples: Dataset[Any], loss: Loss, epoch: int, epochs: int
) -> float:
    """Mean loss of one pass over the samples, which trains the network; their order depends on the epoch alone."""
    order = torch.Generator().manual_seed(SEED + epoch)
    batches = DataLoader(samples, BATCH, shuffle=True, drop_last=True, generator=order)
    network.train()
    total = 0.0
    for step, (images, targets) in enumerate(batches, epoch * len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * _share(step / (epochs * len(batches)))
        error = loss(network(images.contiguous(memory_format=torch.channels_last)), targets)
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        total += float(error.detach())
    return total / len(batches)


def _share(progress: float) -> float:
    """Share of the highest learning rate: up along a line, then down to 0 along a cosine."""
    return min((progress + 1e-3) / WARMUP, 0.5 * (1.0 + math.cos(math.pi * progress)))


def main() -> None:
    """Trains the example that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=list(EXAMPLES))
    name = parser.parse_args().example
    torch.set_num_threads(1)  # the weights depend on it, by rounding
    network = train(name)
    file = WEIGHTS / f"{EXAMPLES[name].network.__name__.lower()}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, file)
    shutil.rmtree(_folder(name))
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, after {time.process_time() / 60:.1f} minutes of processor time")


if __name__ == "__main__":
    main()
