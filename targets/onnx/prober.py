"""Latency models of candidates: the dense network, exported to ONNX once, cut to a structure without torch."""

from __future__ import annotations

import numpy as np
import onnx
from torch import nn

from ...calibration.ranges import collect, ranges
from ...pipeline.options import Precision
from ...pipeline.signature import Signature
from ..base import Arrays, Structure
from ..layer_sizes import Layer, LayerSizes
from .edit import OnnxEditor, cut
from .export import export_float
from .graph import Graph, attribute, output_axis
from .int8 import Recipe, quantize


class OnnxProber(LayerSizes):
    """The dense network, exported once; candidates are cut from it without torch."""

    def __init__(self, module: nn.Module, signature: Signature, precision: Precision) -> None:
        network = Graph(export_float(module, signature))
        super().__init__(lambda: _sizes(network), lambda removed: OnnxEditor(network).remaining(removed))
        self.network = network  # in float
        self.dense = network  # what candidates are cut from
        if precision is Precision.INT8:
            seen = ranges(collect(network.model, [stand_ins(signature)]), "min-max")
            self.dense = Graph(quantize(network.model, seen, Recipe("min-max", 8)))

    def candidate(self, structure: Structure) -> bytes:
        """A model of this structure in the artifact's precision."""
        return self.file_of(cut(self.dense, structure))

    def file_of(self, model: onnx.ModelProto) -> bytes:
        """The file of a graph that was cut from `dense`, in the artifact's precision."""
        return bytes(model.SerializeToString())


def stand_ins(signature: Signature, count: int = 4) -> Arrays:
    """Inputs to take ranges on where latency alone matters, which does not depend on them: normal numbers; whole ones are 1."""
    rng = np.random.default_rng(0)
    found = tuple(
        rng.standard_normal((count, *spec.shape), dtype=np.float32)
        if spec.dtype == "float32"
        else np.ones((count, *spec.shape), spec.dtype)
        for spec in signature.inputs
    )
    return found if len(found) > 1 else found[0]


def _sizes(graph: Graph) -> dict[str, Layer]:
    found = {}
    for name, node in graph.layers().items():
        dims, axis, groups = graph.constants[graph.weight(node)[0]].dims, output_axis(node), attribute(node, "group", 1)
        positions = int(np.prod(graph.shapes[node.output[0]])) // dims[axis]
        found[name] = Layer(dims[1 - axis] * groups, dims[axis], int(np.prod(dims[2:])), groups, positions)
    return found
