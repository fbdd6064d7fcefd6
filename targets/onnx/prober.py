"""Latency models of candidates: the dense network, exported to ONNX once, cut to a structure without torch."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import onnx
from torch import nn

from ...calibration.ranges import collect, ranges
from ...pipeline.types import Precision
from ..base import Structure
from .edit import Layer, cut, layers
from .export import export_float
from .int8 import Recipe, quantize


class OnnxProber:
    """The dense network, exported once; candidates are cut from it without torch."""

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> None:
        self.network = export_float(module, image_shape)
        self._model = self.network
        if precision is Precision.INT8:
            rng = np.random.default_rng(0)
            images = rng.standard_normal((4, *image_shape), dtype=np.float32)  # what the ranges are does not change the time
            recipe = Recipe("min-max", 8)
            self._model = quantize(self.network, ranges(collect(self.network, [images]), recipe.ranges), recipe)
        self._alive: dict[tuple[str, ...], frozenset[str]] = {}

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The dense network's layers by module name."""
        return layers(self.network)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Layer -> how many output positions it computes."""
        return _output_positions(self.network)

    def candidate(self, structure: Structure) -> bytes:
        """A model of this structure in the artifact's precision."""
        return bytes(cut(self._model, structure).SerializeToString())

    def macs(self, structure: Structure) -> int:
        """Multiply-accumulates of this structure's convolutions and linear layers, batch 1."""
        total = 0
        for name in self.alive(structure):
            layer = self.layers[name]
            inputs, outputs = structure.widths.get(name, (layer.inputs, layer.outputs))
            total += self.positions[name] * layer.kernel * outputs * self.fan_in(layer, inputs)
        return total

    def alive(self, structure: Structure) -> frozenset[str]:
        """The layers that are left when the removed branches are gone."""
        removed = tuple(sorted(structure.removed))
        if removed not in self._alive:
            self._alive[removed] = frozenset(layers(cut(self.network, Structure({}, removed))))
        return self._alive[removed]

    @staticmethod
    def fan_in(layer: Layer, inputs: int) -> int:
        """Input channels that one output of a layer sees when `inputs` are kept."""
        depthwise = layer.groups > 1 and layer.groups == layer.inputs
        return 1 if depthwise else inputs // layer.groups


def _output_positions(model: onnx.ModelProto) -> dict[str, int]:
    """Layer -> how many output positions it computes: height x width, 1 for a linear layer on a vector."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes: dict[str, Any] = {v.name: v.type.tensor_type.shape.dim for v in (*graph.value_info, *graph.output)}
    positions = {}
    for name, layer in layers(model).items():
        sizes = [int(dim.dim_value) for dim in shapes[layer.output]]
        positions[name] = int(np.prod(sizes)) // layer.outputs
    return positions
