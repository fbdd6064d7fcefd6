"""Latency models of candidates for LiteRT: the dense network, converted once, and what is cut from its file."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from ...calibration.ranges import ranges
from ...pipeline.types import Precision
from ..base import Structure
from .convert import convert
from .edit import cut, remaining
from .file import read, write
from .int8 import collect, quantize, with_int8_weights
from .layers import layer_names, layers


class TfliteProber:
    """The dense network, converted once; candidates are cut from the file.

    In half precision candidates are float: the runtime unpacks the weights when it loads them and runs the same kernels.
    """

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> None:
        channels, height, width = image_shape
        half = (0.5,) * channels  # what is normalised with does not change the time
        self.network, weights = convert(distinct(module), image_shape, half, half)
        model = read(self.network)
        self._names = layer_names(model, weights)
        self._layers = layers(model, self._names)
        self._model = model
        self._alive: dict[tuple[str, ...], frozenset[str]] = {}
        if precision is Precision.INT8:
            images = np.random.default_rng(0).integers(0, 256, (4, height, width, channels)).astype(np.float32)
            found = ranges(collect(self.network, [images]), "min-max")  # what the ranges are does not change the time
            self._model = read(quantize(self.network, found))
        elif precision is Precision.DYNAMIC:
            self._model = read(with_int8_weights(self.network))

    def candidate(self, structure: Structure) -> bytes:
        """A model of this structure in the artifact's precision."""
        return write(cut(self._model, self._names, structure))

    def macs(self, structure: Structure) -> int:
        """Multiply-accumulates of this structure's convolutions and linear layers, batch 1."""
        removed = tuple(sorted(structure.removed))
        if removed not in self._alive:
            self._alive[removed] = frozenset(self._left(removed))
        total = 0
        for name, layer in self._layers.items():
            if name in self._alive[removed]:
                inputs, outputs = structure.widths.get(name, (layer.inputs, layer.outputs))
                depthwise = layer.groups > 1 and layer.groups == layer.inputs
                total += layer.positions * layer.kernel * outputs * (1 if depthwise else inputs // layer.groups)
        return total

    def _left(self, removed: tuple[str, ...]) -> list[str]:
        """Layers that are there when some branches are not."""
        return remaining(self._model, self._names, removed)


def distinct(module: nn.Module) -> nn.Module:
    """A copy in which no two layers have equal weights, so that each is found in the converted network."""
    same = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in same.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                noise = torch.rand(layer.weight.shape, generator=generator) - 0.5
                layer.weight.add_(noise * (0.01 / layer.weight[0].numel() ** 0.5))
    return same
