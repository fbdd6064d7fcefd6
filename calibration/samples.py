"""Which images ranges are measured on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def balanced(labels: IntArray, count: int, *, seed: int) -> IntArray:
    """Positions of `count` images with the classes as even as they can be, in seeded random order.

    A class that has too few images gives all it has and the others make up for it. All positions when there are not more than
    `count`.

    Args:
        labels: class of each image, (N,).
        count: how many.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)  # how many images of the same class come before in that order
    shuffled = np.asarray(labels)[order]
    for label in np.unique(shuffled):
        places = np.flatnonzero(shuffled == label)
        rank[places] = np.arange(len(places))
    first = np.argsort(rank, kind="stable")[:count]
    return np.asarray(order[np.sort(first)], dtype=np.int64)
