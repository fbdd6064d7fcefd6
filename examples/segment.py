"""A recipe: a small U-Net that says for each pixel which digit it belongs to, judged by mean intersection over union.

    edge-compress --target x86 --recipe examples/segment.py --out runs/segment

The network is in `segmenter.py`, the images in `scenes.py`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from scenes import Scenes, Split
from segmenter import KINDS, Segmenter
from torch import Tensor
from torch.nn import functional as F

WEIGHTS = Path(__file__).parent / "weights" / "segmenter.safetensors"  # made by `python examples/train.py segment`


def model() -> Segmenter:
    """The trained network."""
    network = Segmenter()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def datasets() -> dict[Split, Scenes]:
    """Images and the class of each of their pixels, by split."""
    sizes: dict[Split, int] = {"train": 5000, "search": 300, "test": 300}
    return {split: Scenes(split, size, "classes") for split, size in sizes.items()}


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of all pixels, and once more, among the digits, of the few that belong to one."""
    return F.cross_entropy(outputs, target) + F.cross_entropy(outputs[:, 1:], target - 1, ignore_index=-1)


class MeanOverlap:
    """Intersection over union in per cent: of each class over the pixels of all images, then the mean over the classes."""

    name, unit, higher_is_better = "mIoU", "%", True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._pairs = torch.zeros(KINDS, KINDS, dtype=torch.long)  # pixels by true and answered class

    def update(self, outputs: Tensor, target: Tensor) -> None:
        """Takes in some images: logits (n, kinds, H, W) and true classes (n, H, W)."""
        self._pairs += torch.bincount((target * KINDS + outputs.argmax(1)).flatten(), minlength=KINDS**2).view(KINDS, KINDS)

    def compute(self) -> float:
        """The value for all images so far; a class that is neither there nor answered does not count."""
        both, either = self._pairs.diagonal(), self._pairs.sum(0) + self._pairs.sum(1) - self._pairs.diagonal()
        return 100.0 * float((both[either > 0] / either[either > 0]).mean())


metric = MeanOverlap  # called, it gives a new one
