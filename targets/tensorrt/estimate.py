"""How long a network would take on a Jetson, relative to another: a roofline with a floor for each layer. Nothing is measured.

For searches without a board. A layer takes the longer of its arithmetic and its memory traffic, and what a kernel takes that
does next to nothing; sums, ReLU and BatchNorm are part of the layer before them, as TensorRT fuses them. Only ratios between
structures in one precision leave this module: the constants set how much a removed layer counts against narrower ones, not any
time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...pipeline.types import Precision


@dataclass(frozen=True)
class Hardware:
    """Peak rates of a board, and two constants of the model."""

    name: str
    operations: dict[Precision, float]  # per second, dense, of the GPU's tensor cores; a multiply-accumulate is two
    bytes_per_s: float  # of its memory
    reached: float  # share of the peak that a convolution of batch 1 gets
    floor_s: float  # of a layer, whatever its size


# Rates: NVIDIA's data sheet of the Orin Nano Super (67 TOPS are int8 with 2:4 sparsity: half of that without, half again for
# fp16 and for TF32; 102 GB/s). The last two constants are ours. With an AGX Orin's rates (85 TOPS, 205 GB/s) they give
# ResNet-50, batch 1, 1.9 ms in fp32, 1.2 in fp16 and 0.8 in int8; a run of trtexec 10.3 on that board that others published
# has 1.94, 1.03, 1.01.
ORIN_NANO = Hardware(
    name="Jetson Orin Nano Super",
    operations={Precision.INT8: 33.5e12, Precision.FP16: 16.7e12, Precision.FP32: 8.4e12},
    bytes_per_s=102e9,
    reached=0.3,
    floor_s=8e-6,
)
_BYTES = {Precision.INT8: 1, Precision.FP16: 2, Precision.FP32: 4}


@dataclass(frozen=True)
class Work:
    """What one layer does, batch 1."""

    macs: int
    values: int  # weights, inputs and outputs, each counted once


def seconds(layers: Iterable[Work], precision: Precision, hardware: Hardware = ORIN_NANO) -> float:
    """What the model says these layers take, one after another. For ratios only."""
    rate, total = hardware.operations[precision] * hardware.reached, 0.0
    for layer in layers:
        arithmetic = 2 * layer.macs / rate
        traffic = layer.values * _BYTES[precision] / hardware.bytes_per_s
        total += max(arithmetic, traffic) + hardware.floor_s
    return total
