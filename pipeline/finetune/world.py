"""The processes that train one network together. In the product there is one; benchmarks/process_group.py has several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """One process, which has all the images. A subclass for several overrides every method; all ranks call them in one order."""

    rank: int = 0  # 0..size-1
    size: int = 1
    device: str = "cpu"

    def share(self, count: int, least: int = 1) -> range:
        """Positions of 0..count-1 that this rank works on, at least `least` of them."""
        return range(count)

    def mean(self, tensors: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
        """Means over all images, from this rank's means over `images` images."""
        return dict(tensors)

    def mean_of(self, value: float, images: int) -> float:
        """`mean` of one number."""
        return value

    def agree(self, what: str, value: str | Mapping[str, Tensor]) -> None:
        """Raises BuildError where `value` (named `what` in the message) is not the same on every rank."""

    def average_buffers(self, module: nn.Module) -> None:
        """Sets BatchNorm's running statistics to their mean over all ranks."""

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over all ranks in the backward pass."""
        return module


ALONE = World()
