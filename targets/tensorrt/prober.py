"""Latency models of candidates for a Jetson: files for a board, and estimates for when there is none."""

from __future__ import annotations

import numpy as np
import onnx
from torch import nn

from ...calibration.ranges import collect, ranges
from ...pipeline.types import Precision
from ..base import Structure
from ..onnx.edit import cut, layers
from ..onnx.int8 import Recipe, halve
from ..onnx.prober import OnnxProber
from .estimate import Work, seconds
from .qdq import quantize


class JetsonProber(OnnxProber):
    """The dense network, exported once; candidates are cut from it in float and then quantized."""

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> None:
        super().__init__(module, image_shape, Precision.FP32)
        self._precision, self._shape = precision, image_shape
        self._inputs = _input_positions(self.network)
        self._dense_s = self._seconds(Structure({}))

    def candidate(self, structure: Structure) -> bytes:
        """A file of this structure in the artifact's precision."""
        model = cut(self.network, structure)
        if self._precision is Precision.INT8:
            rng = np.random.default_rng(0)
            images = rng.standard_normal((2, *self._shape), dtype=np.float32)  # what the ranges are does not change the time
            model = quantize(model, ranges(collect(model, [images], bins=16), "min-max"), Recipe("min-max", 8))
        elif self._precision is Precision.FP16:
            model = halve(model)
        return bytes(model.SerializeToString())

    def estimate(self, structure: Structure) -> float:
        """Time of this structure as a share of the dense one's in the same precision, by `estimate`: an estimate.

        What the precision itself saves is left out: without a board nobody knows it.
        """
        return self._seconds(structure) / self._dense_s

    def _seconds(self, structure: Structure) -> float:
        works = []
        for name in sorted(self.alive(structure)):
            layer = self.layers[name]
            inputs, outputs = structure.widths.get(name, (layer.inputs, layer.outputs))
            weights = layer.kernel * outputs * self.fan_in(layer, inputs)
            values = weights + inputs * self._inputs[name] + outputs * self.positions[name]
            works.append(Work(macs=self.positions[name] * weights, values=values))
        return seconds(works, self._precision)


def _input_positions(model: onnx.ModelProto) -> dict[str, int]:
    """Layer -> positions of its input: height x width, 1 for a vector."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    sizes = {
        v.name: int(np.prod([d.dim_value for d in v.type.tensor_type.shape.dim][2:]))
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    source = {node.name: node.input[0] for node in model.graph.node}
    return {name: sizes[source[layer.node]] for name, layer in layers(model).items()}
