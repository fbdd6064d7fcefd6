"""Scores of single connections by lambda."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from ..network.compute import CPU, Compute
from ..network.exact_mode import weight_layers
from ..network.memory import backward_batch_size
from ..network.modes import borrowed
from ..run_folder import Stage
from ..task.samples import BATCH, batches
from . import criteria as hasa
from .curvature import gauss_newton, kept_or
from .ranking import CURVATURE_IMAGES


class Scores(Protocol):
    """Scores of all connections: of a layer the lowest go first."""

    @property
    def name(self) -> str:
        """What the ranking is called."""
        ...

    def at(self, lambda_: float) -> Mapping[str, Tensor]:
        """Layer -> score of the weight's shape."""
        ...

    def grid(self) -> tuple[float, ...]:
        """Lambdas worth trying."""
        ...


class ConnectionScores:
    """Scores of all connections by lambda; the curvature is computed once, when it is first needed.

    Args:
        net: dense network with plain weights, eval mode.
        inputs: gives training images (n, C, H, W), augmented.
        score: a name in `hasa.SCORES`.
        seed: of the signs the curvature is sampled with, and of the score `random`.
        compute: where the curvature is computed; None: where the network is.
    """

    def __init__(
        self,
        net: nn.Module,
        inputs: Callable[[], Tensor],
        score: str,
        seed: int,
        compute: Compute | None = None,
    ) -> None:
        self._compute = compute
        self.name, self.net, self._inputs, self._seed = hasa.known(score), net, inputs, seed
        self._curvature: dict[str, Tensor] | None = None
        self.keeps: Stage | None = None  # the stage that stores the curvature between calls

    def at(self, lambda_: float) -> dict[str, Tensor]:
        """Layer -> score of the weight's shape."""
        weights = {name: layer.weight for name, layer in weight_layers(self.net).items()}
        return hasa.score(self.name, weights, self._measured(), lambda_, seed=self._seed)

    def grid(self) -> tuple[float, ...]:
        """Lambdas worth trying."""
        return hasa.lambda_grid(self.name, self._measured())

    def _measured(self) -> dict[str, Tensor] | None:
        if self._curvature is None and self.name in hasa.CURVED:
            shapes = {name: layer.weight.shape for name, layer in weight_layers(self.net).items()}
            self._curvature = kept_or(self.keeps, self.curvature, shapes)
        return self._curvature

    def curvature(self) -> dict[str, Tensor]:
        """Gauss-Newton diagonal: layer -> curvature of the weight's shape."""
        inputs = self._inputs()[:CURVATURE_IMAGES]
        with borrowed(self.net, None if self._compute is None else self._compute.device):
            size = backward_batch_size(self.net.eval(), inputs, self._compute or CPU, BATCH)
            return gauss_newton(self.net, batches(inputs, size), seed=self._seed)
