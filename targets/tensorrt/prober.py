"""Latency models of candidates for a Jetson: files for a board, and estimates for when there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import onnx
from torch import nn

from ...calibration.ranges import collect, ranges
from ...pipeline.options import Precision
from ...pipeline.signature import Signature
from ..base import Structure
from ..onnx.graph import LAYER_OPS, Graph
from ..onnx.int8 import Recipe, halve
from ..onnx.prober import OnnxProber
from ..stand_ins import stand_ins
from .qdq import quantize

# Rates: NVIDIA's data sheet of the Orin Nano Super (67 TOPS are int8 with 2:4 sparsity: half of that without, half again for
# fp16 and for TF32; 102 GB/s). The last two constants are ours. With an AGX Orin's rates (85 TOPS, 205 GB/s) they give
# ResNet-50, batch 1, 1.9 ms in fp32, 1.2 in fp16 and 0.8 in int8; a run of trtexec 10.3 on that board that others published
# has 1.94, 1.03, 1.01.
OPERATIONS_PER_S = {Precision.INT8: 33.5e12, Precision.FP16: 16.7e12, Precision.FP32: 8.4e12}  # a multiply-accumulate is two
_BYTES_PER_S = 102e9  # of the memory
_REACHED = 0.3  # share of the peak that a convolution of batch 1 gets
FLOOR_S = 8e-6  # of a layer, whatever its size
_BYTES = {Precision.INT8: 1, Precision.FP16: 2, Precision.FP32: 4}


class JetsonProber(OnnxProber):
    """A network, exported once; candidates are cut from it in float and then quantized."""

    def __init__(self, module: nn.Module, signature: Signature, precision: Precision) -> None:
        super().__init__(module, signature, Precision.FP32)
        self._precision, self._signature = precision, signature

    def file_of(self, model: onnx.ModelProto) -> bytes:
        """See `OnnxProber.file_of`."""
        if self._precision is Precision.INT8:
            inputs = stand_ins(self._signature, 2)
            model = quantize(model, ranges(collect(model, [inputs], bins=16), "min-max"), Recipe("min-max", 8))
        elif self._precision is Precision.FP16:
            model = halve(model)
        return bytes(model.SerializeToString())

    def estimate(self, structure: Structure) -> float:
        """Estimated latency of the network's own structure as a share of the dense one's in the same precision: 1."""
        return 1.0

    @property
    def whole_s(self) -> float:
        """See `targets.base.Estimator`."""
        return self.seconds_of(self.network)

    def seconds_of(self, graph: Graph) -> float:
        """Estimated time of a float graph in the artifact's precision; for ratios only."""
        shapes = graph.shapes | {name: tuple(c.dims) for name, c in graph.constants.items()}
        works = []
        for node in graph.nodes:
            if node.op_type in LAYER_OPS:
                first, second, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
                inner = prod(second[1:]) if node.op_type == "Conv" else first[-1]
                works.append(Work(macs=prod(out) * inner, values=prod(first) + prod(second) + prod(out)))
        return seconds(works, self._precision)


@dataclass(frozen=True)
class Work:
    """Work of one layer, batch 1."""

    macs: int
    values: int  # weights, inputs and outputs, each counted once


def seconds(layers: Iterable[Work], precision: Precision) -> float:
    """Estimated time of these layers on an Orin Nano Super, one after another. For ratios only.

    A roofline with a floor: a layer takes the longer of its arithmetic and its memory traffic, and what a kernel takes that does
    next to nothing; sums, ReLU and BatchNorm are part of the layer before them, as TensorRT fuses them. The constants set how
    much a removed layer counts against narrower ones, not any time.
    """
    rate, total = OPERATIONS_PER_S[precision] * _REACHED, 0.0
    for layer in layers:
        arithmetic = 2 * layer.macs / rate
        traffic = layer.values * _BYTES[precision] / _BYTES_PER_S
        total += max(arithmetic, traffic) + FLOOR_S
    return total
