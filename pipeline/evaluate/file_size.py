"""What a candidate's file takes, without writing it: a line through the sizes of files that were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...targets.base import Structure

FloatArray = NDArray[np.float64]


class FileSize:
    """Bytes of structures in one format: so many for each weight, each output channel and each layer, beside what stays.

    What is stored beside the weights (biases, scales, tables of operators) is a tenth of a small int8 network and differs by
    format, so the three numbers are fitted by least squares to files that were written.

    Args:
        stored: weights, output channels (or values of vectors) and layers of a structure, (3,).
        written: bytes of a structure's file.
        structures: to fit to: the dense one first, then some that differ from it in widths and in branches.
    """

    def __init__(
        self,
        stored: Callable[[Structure], FloatArray],
        written: Callable[[Structure], int],
        structures: Sequence[Structure],
    ) -> None:
        self._stored = stored
        dense, *others = structures
        self._dense, self._bytes = stored(dense), float(written(dense))
        differences = np.array([stored(s) - self._dense for s in others]).reshape(-1, 3)
        self._each: FloatArray = np.linalg.lstsq(differences, np.array([written(s) - self._bytes for s in others]), rcond=None)[0]

    def __call__(self, structure: Structure) -> float:
        """Bytes of this structure's file, to a few per cent."""
        return self._bytes + float(self._each @ (self._stored(structure) - self._dense))
