"""A recipe: a small object detector, judged by mean average precision.

    edge-compress --target x86 --recipe examples/detect.py --out runs/detect

Needs `pip install torchmetrics pycocotools`. Network, loss and decoding are in `detector.py`, the images in `scenes.py`.
"""

from pathlib import Path

from detector import Detector, Maps, decoded, detection_loss, drawn
from safetensors.torch import load_file
from scenes import Scenes, Split
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

WEIGHTS = Path(__file__).parent / "weights" / "detector.safetensors"  # made by `python examples/train.py detect`


def model() -> Detector:
    """The trained network."""
    network = Detector()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def datasets() -> dict[Split, Scenes]:
    """Images and their boxes, by split."""
    sizes: dict[Split, int] = {"train": 5000, "search": 300, "test": 300}
    return {split: Scenes(split, size, "boxes") for split, size in sizes.items()}


def outputs(raw: Maps) -> Maps:
    """The three maps, as the network gives them: boxes are decoded outside of what is deployed."""
    return raw


class MeanPrecision:
    """Mean average precision at an IoU of 0.5, in per cent; the boxes are decoded here, from what the artifact answered."""

    name, unit, higher_is_better = "mAP@50", "%", True

    def __init__(self) -> None:
        self._figures = MeanAveragePrecision(iou_type="bbox", iou_thresholds=[0.5], backend="pycocotools")

    def reset(self) -> None:
        """Forgets all images."""
        self._figures.reset()

    def update(self, outputs: Maps, target: Tensor) -> None:
        """Takes in some images; rows of `target` are (class, box), those of class -1 are none."""
        rows = [each[each[:, 0] >= 0] for each in target]
        self._figures.update(decoded(outputs), [{"boxes": each[:, 1:], "labels": each[:, 0].long()} for each in rows])

    def compute(self) -> float:
        """The value for all images so far."""
        return 100.0 * float(self._figures.compute()["map"])


loss, picture = detection_loss, drawn  # what the network was trained with; what the report shows
metric = MeanPrecision  # called, it gives a new one
