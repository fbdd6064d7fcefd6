"""Latency models of candidates: the dense network, exported to ONNX once, cut to a structure without torch."""

from __future__ import annotations

import numpy as np
from torch import nn

from ...calibration.ranges import collect, ranges
from ...pipeline.types import Precision
from ..base import Structure
from ..layer_sizes import Layer, LayerSizes
from .edit import OnnxEditor, cut
from .export import export_float
from .graph import Graph, attribute, output_axis
from .int8 import Recipe, quantize


class OnnxProber(LayerSizes):
    """The dense network, exported once; candidates are cut from it without torch."""

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> None:
        network = Graph(export_float(module, image_shape))
        super().__init__(lambda: _sizes(network), lambda removed: OnnxEditor(network).remaining(removed))
        self.network = self._dense = network
        if precision is Precision.INT8:
            rng = np.random.default_rng(0)
            images = rng.standard_normal((4, *image_shape), dtype=np.float32)  # latency does not depend on the ranges
            seen = ranges(collect(network.model, [images]), "min-max")
            self._dense = Graph(quantize(network.model, seen, Recipe("min-max", 8)))

    def candidate(self, structure: Structure) -> bytes:
        """A model of this structure in the artifact's precision."""
        return bytes(cut(self._dense, structure).SerializeToString())


def _sizes(graph: Graph) -> dict[str, Layer]:
    found = {}
    for name, node in graph.layers().items():
        dims, axis, groups = graph.constants[graph.weight(node)[0]].dims, output_axis(node), attribute(node, "group", 1)
        positions = int(np.prod(graph.shapes[node.output[0]])) // dims[axis]
        found[name] = Layer(dims[1 - axis] * groups, dims[axis], int(np.prod(dims[2:])), groups, positions)
    return found
