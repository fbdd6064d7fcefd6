"""What a candidate's file takes, without writing it: a line through the sizes of files that were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from ...targets.base import Structure

FloatArray = NDArray[np.float64]


class FileSize:
    """Bytes of structures in one format: so many for each weight, each output channel and each layer, beside what stays.

    What is stored beside the weights (biases, scales, tables of operators) is a tenth of a small int8 network and differs by
    format, so the three numbers are fitted by least squares to files that were written.

    Args:
        net: the canonical dense network.
        written: bytes of a structure's file.
        structures: to fit to: the dense one first, then some that differ from it in widths and in branches.
    """

    def __init__(self, net: fx.GraphModule, written: Callable[[Structure], int], structures: Sequence[Structure]) -> None:
        self._layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        dense, *others = structures
        self._dense, self._bytes = self._counts(dense), float(written(dense))
        differences = np.array([self._counts(s) - self._dense for s in others]).reshape(-1, 3)
        self._each: FloatArray = np.linalg.lstsq(differences, np.array([written(s) - self._bytes for s in others]), rcond=None)[0]

    def __call__(self, structure: Structure) -> float:
        """Bytes of this structure's file, to a percent or so."""
        return self._bytes + float(self._each @ (self._counts(structure) - self._dense))

    def _counts(self, structure: Structure) -> FloatArray:
        """Weights, output channels and layers, of those layers that plans change."""
        weights = channels = 0.0
        for name, (inputs, outputs) in structure.widths.items():
            layer = self._layers[name]
            each = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            depthwise = groups > 1 and groups == layer.weight.shape[0]
            weights += each * outputs * (1 if depthwise else inputs / groups)
            channels += outputs
        return np.array([weights, channels, float(len(structure.widths))])
