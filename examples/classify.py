"""A recipe: handwritten digits by a small network that it trains itself, in seconds. It needs no package besides edge-compress.

Run it with `edge-compress --target x86 --recipe examples/classify.py --out runs/classify`.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def datasets() -> dict[str, TensorDataset]:
    """Images (1, 8, 8) in [0, 1] and their labels; edge-compress cuts the search split from the training samples."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    return {"train": TensorDataset(images[:1297], labels[:1297]), "test": TensorDataset(images[1297:], labels[1297:])}


def model() -> nn.Module:
    """The trained network. Yours is likelier to be read: `net.load_state_dict(torch.load(FILE, weights_only=True))`."""
    torch.manual_seed(0)
    sizes = ((1, 16, 1), (16, 32, 2), (32, 64, 2))
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b, stride in sizes]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * 64, 10))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    images, labels = datasets()["train"].tensors
    for some in torch.cat([torch.randperm(len(images)) for _ in range(10)]).split(64):  # 10 epochs
        optimizer.zero_grad()
        loss(net(images[some]), labels[some]).backward()
        optimizer.step()
    return net.eval()


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy. Pruned networks are trained with it and with the distance to what this network answers."""
    return nn.functional.cross_entropy(outputs, target)


class Top1:
    """The share of images whose class is right, in per cent; fed with what a network or an artifact answered."""

    name, unit, higher_is_better = "top-1", "%", True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._right: list[Tensor] = []

    def update(self, outputs: Tensor, target: Tensor) -> None:
        """Takes in some images: logits (n, 10) and labels (n,)."""
        self._right.append(outputs.argmax(1) == target)

    def compute(self) -> float:
        """The value for all images so far."""
        return 100.0 * float(torch.cat(self._right).double().mean())


metric = Top1  # called, it gives a new one
