"""Latency models of candidates: a network exported to ONNX, in the artifact's precision."""

from __future__ import annotations

import onnx
from torch import nn

from ...calibration.ranges import collect, ranges
from ...pipeline.errors import BuildError
from ...pipeline.options import Precision
from ...pipeline.signature import Signature
from ..base import Structure
from ..stand_ins import stand_ins
from .export import export_float
from .graph import Graph
from .int8 import Recipe, quantize


class OnnxProber:
    """A network, exported once; its graph can be cut by the labels of its axes (`pipeline.evaluate.exported`)."""

    def __init__(self, module: nn.Module, signature: Signature, precision: Precision) -> None:
        network = Graph(export_float(module, signature))
        self.network = network  # in float
        self.dense = network  # what candidates are cut from
        if precision is Precision.INT8:
            seen = ranges(collect(network.model, [stand_ins(signature)]), "min-max")
            self.dense = Graph(quantize(network.model, seen, Recipe("min-max", 8)))

    def candidate(self, structure: Structure) -> bytes:
        """The network's file in the artifact's precision.

        Raises:
            BuildError: another structure than the network's own is asked for.
        """
        if structure.widths or structure.removed:
            raise BuildError("an ONNX file is not cut by its layers", found=structure.key())
        return self.file_of(self.dense.model)

    def file_of(self, model: onnx.ModelProto) -> bytes:
        """The file of a graph that was cut from `dense`, in the artifact's precision."""
        return bytes(model.SerializeToString())
