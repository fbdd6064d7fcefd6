"""How much layer-wise reconstruction may hold in memory."""

from __future__ import annotations

import math

from torch import Tensor

from ..axes.capture import Captured
from ..score.layer_moments import BYTES_PER_ENTRY

HELD_TENSORS = 8  # float32 activations of one image that are alive at once during sequential reconstruction
LEAST_IMAGES = 32
SOLVING_BYTES = BYTES_PER_ENTRY  # of a Hessian that a layer is solved with: float64 matrix, damped copy, factor


def affordable(widest: int, count: int, memory_bytes: int) -> int:
    """How many images (at most `count`, at least 32) whose activations can be held for a few layers at a time.

    Args:
        widest: elements of the largest activation of one image.
        count: images wanted.
        memory_bytes: that they may take.
    """
    return max(LEAST_IMAGES, min(count, memory_bytes // (4 * widest * HELD_TENSORS)))


def widest_activation(captured: Captured) -> int:
    """Elements of the largest activation of one sample."""
    values = (node.meta.get("val") for node in captured.graph.nodes)
    return max(math.prod(value.shape[1:]) for value in values if isinstance(value, Tensor))


def reduced(what: str, count: int, wanted: int, memory_bytes: int) -> str:
    """A sentence for the report on samples that memory did not allow; empty if all were used."""
    if count >= wanted:
        return ""
    return f"{what} used {count} of {wanted} samples: more do not fit in {memory_bytes / 2**30:.1f} GiB of memory."
