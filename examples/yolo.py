"""A recipe: a YOLO detector of the package ultralytics up to its raw outputs, judged by agreement with the dense network.

    YOLO_CHECKPOINT=my.pt EDGE_COMPRESS_PHOTOS=my/photographs edge-compress --target x86 --recipe examples/yolo.py --out runs/yolo

Needs `pip install ultralytics` (AGPL-3.0). Without a checkpoint the weights are random: enough to see what can be pruned.
To decode boxes with the network that comes back, give its head its own class again: `network.model[-1].__class__ = Detect`.
"""

import os
from pathlib import Path

import numpy as np
from photographs import photographs, square
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

try:
    from ultralytics import YOLO
    from ultralytics.nn.modules.head import Detect
except ImportError as error:
    raise ImportError(f"yolo.py needs {error.name}: pip install ultralytics") from error


class RawHead(Detect):
    """The detection head without what follows its convolutions; the same in training and in use."""

    def forward(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Box distances (n, 4 * bins, places) and class logits (n, classes, places)."""
        found = self.forward_head(x, **(self.one2one if self.end2end else self.one2many))
        return found["boxes"], found["scores"]


def model() -> nn.Module:
    """The network of a checkpoint, or an untrained one."""
    network = YOLO(os.environ.get("YOLO_CHECKPOINT", "yolo11n.yaml")).model.float().requires_grad_()
    network.model[-1].__class__ = RawHead
    return network.eval()


class Squares(Dataset[tuple[Tensor, None]]):
    """Squares (3, 320, 320) in [0, 1] of photographs, without targets."""

    def __init__(self, paths: list[Path], count: int) -> None:
        self._paths, self._count = paths, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> tuple[Tensor, None]:
        photo, random = Image.open(self._paths[i % len(self._paths)]).convert("RGB"), np.random.default_rng(i)
        side = random.uniform(0.5, 1) * min(photo.size)
        left, top = random.uniform(0, 1, 2) * (photo.width - side, photo.height - side)
        return square(photo, left, top, side, 320), None


def datasets() -> dict[str, Squares]:
    """Squares of different photographs, by split."""
    train, test = photographs()
    return {"train": Squares(train, 2000), "test": Squares(test, 300)}
