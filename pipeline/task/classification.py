"""Classification of images into classes that are given: top-1, cross-entropy, distillation of class probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..network.calling import Outputs
from ..signature import TOP1, Metric
from .samples import Batch

TEMPERATURE = 4.0  # both sets of logits are divided by it for the teacher's part
DISTILLED = 0.9  # share of the teacher in the loss; without a teacher the labels have all of it


@dataclass(frozen=True)
class Classification:
    """One vector of class scores for each image, and its label. See `task.Task` for the members."""

    distilled: float = DISTILLED
    temperature: float = TEMPERATURE
    metric: Metric = TOP1
    compares: bool = False
    labelled: bool = True

    @property
    def key(self) -> str:
        """See `task.Task`."""
        return f"classification {self.distilled} {self.temperature}"

    def judge(self) -> RightOnes:
        """Counts the images whose class is right."""
        return RightOnes()

    def training_loss(self, outputs: Outputs, targets: Any, dense: Outputs | None) -> Tensor:
        """See `distillation_loss`."""
        teacher = None if dense is None else dense[0].float()
        return distillation_loss(outputs[0].float(), teacher, targets, self.distilled, self.temperature)

    def distance(self, outputs: Outputs, targets: Any, dense: Outputs | None) -> float:
        """Mean cross-entropy of the labels."""
        return float(F.cross_entropy(outputs[0], targets))

    def share(self, value: float, dense: float) -> float:
        """Share of the images classified correctly."""
        return value / 100.0

    def picture(self, batch: Batch, outputs: Outputs) -> None:
        """Returns None: no visualisation for classification."""


class RightOnes:
    """Which images are classified correctly. A row of scores with a NaN counts as wrong."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.bool_]] = []

    def update(self, outputs: Outputs, batch: Batch, dense: Outputs | None = None) -> None:
        """See `task.Judge`."""
        scores = outputs[0]
        right = (scores.argmax(1) == batch.targets) & ~scores.isnan().any(1)
        self._parts.append(right.numpy())

    def value(self) -> float:
        """Top-1, percent."""
        return 100.0 * float(np.concatenate(self._parts).mean())

    def per_sample(self) -> NDArray[np.float64]:
        """100 for each image that is right, else 0."""
        return np.where(np.concatenate(self._parts), 100.0, 0.0)

    def over(self, picked: NDArray[np.int64]) -> float:
        """See `task.Judge`."""
        return float(self.per_sample()[picked].mean())


def distillation_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, weight: float = DISTILLED, temperature: float = TEMPERATURE
) -> Tensor:
    """Mean loss of logits (n, classes) against labels (n,) and the teacher's logits (n, classes), if any.

    `(1 - w) * CE(labels) + w * T^2 * KL(teacher || student)` at temperature T (Hinton et al. 2015, equation 1): `T^2` keeps the
    gradient of the teacher's part at one size whatever the temperature (section 2.1).
    """
    hard = F.cross_entropy(student, labels)
    if teacher is None:
        return hard
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return (1.0 - weight) * hard + weight * temperature**2 * soft
