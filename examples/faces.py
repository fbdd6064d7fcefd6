"""A recipe: O-Net, the last of MTCNN's three networks: whether a square of a photograph shows a face, its box and its landmarks.

    EDGE_COMPRESS_PHOTOS=my/photographs/of/people edge-compress --target x86 --recipe examples/faces.py --out runs/faces

Needs `pip install requests tqdm && pip install --no-deps facenet-pytorch==2.6.0` (MIT). The squares are made in `photographs.py`.
Without a folder of photographs there are hardly any faces. Boxes and landmarks count in training, by the dense network's.
"""

import torch
from photographs import Proposals, photographs
from torch import Tensor

try:
    from facenet_pytorch import ONet, PNet
except ImportError as error:
    pip = "pip install requests tqdm && pip install --no-deps facenet-pytorch==2.6.0"
    raise ImportError(f"faces.py needs {error.name}: {pip}") from error


def model() -> ONet:
    """The trained network: squares (n, 3, 48, 48) to boxes (n, 4), landmarks (n, 10), and probabilities of none and a face."""
    return ONet().eval()


def datasets() -> dict[str, Proposals]:
    """Squares of photographs, by split, and the probability of a face by the dense network."""
    train, test = photographs()
    return {"train": Proposals(train, PNet(), ONet(), mirrored=True), "test": Proposals(test, PNet(), ONet())}


def loss(outputs: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    """Cross-entropy with the dense network's probabilities, without class weights: they would move the threshold."""
    none, face = (outputs[2] + 1e-6).log().unbind(1)
    return -(target * face + (1 - target) * none).mean()


class Decisions:
    """Of the dense network's faces, and of its other squares: the share still told as such; the mean of both, in per cent."""

    name, unit, higher_is_better = "faces told", "%", True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets all squares."""
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: tuple[Tensor, Tensor, Tensor], target: Tensor) -> None:
        """Takes in some squares."""
        self._pairs.append((outputs[2][:, 1] > 0.5, target > 0.5))

    def compute(self) -> float:
        """The value for all squares so far."""
        found, dense = (torch.cat(part) for part in zip(*self._pairs, strict=True))
        shares = [(found[dense == kind] == kind).double().mean() for kind in dense.unique()]
        return 100.0 * float(torch.stack(shares).mean())


metric = Decisions  # called, it gives a new one
