"""New values for the layers of an ONNX graph, float or QDQ: quantizing a network again without the quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from ...pipeline.errors import BuildError
from .edit import LAYER_OPS, STEM_PAD

Array = NDArray[Any]


def fill(model: onnx.ModelProto, values: Mapping[str, Array], weight_steps: int = 127) -> None:
    """Write values into the initializers of a graph, in place.

    Args:
        model: what `values` does not name stays as it is. The graph must be the caller's own.
        values: initializer of the float graph -> array, weights as `LAYER.weight`. In a QDQ graph weights are quantized
            symmetrically with scales of their own, and biases in steps of input scale times weight scale, as the kernels want.
        weight_steps: of the int8 weights to each side of zero: see `int8.STEPS`.

    Raises:
        BuildError: the shape of a value is not that of its place.
    """
    slots = {i.name: i for i in model.graph.initializer}
    producer = {n.output[0]: n for n in model.graph.node}
    for name, value in values.items():
        if name in slots:
            _put(slots[name], value)
    for node in model.graph.node:
        if node.op_type not in (*LAYER_OPS, "BatchNormalization"):
            continue
        sources = [producer.get(tensor) for tensor in (*node.input, "")[:3]]
        data, weight, bias = (s if s is not None and s.op_type == "DequantizeLinear" else None for s in sources)
        name = weight.input[0].removesuffix("_quantized") if weight is not None else ""
        if weight is None or name not in values:
            continue
        slot, scales = slots[weight.input[0]], slots[weight.input[1]]
        weights = _padded(values[name], slot, producer.get(data.input[0]) if data is not None else None, producer)
        axis = next((a.i for a in weight.attribute if a.name == "axis"), 1) % weights.ndim if scales.dims else None
        largest = np.abs(weights).max(axis=tuple(i for i in range(weights.ndim) if i != axis), keepdims=True)
        scale = np.maximum(largest / weight_steps, np.finfo(np.float32).tiny).astype(np.float32)
        _put(slot, np.rint(weights / scale).astype(np.int8))
        _put(scales, scale.reshape(tuple(scales.dims)))
        if bias is None or data is None:
            continue
        steps = numpy_helper.to_array(slots[data.input[1]]) * scale.reshape(-1).astype(np.float64)
        exact = np.rint(values[bias.input[0].removesuffix("_quantized")] / steps)
        _put(slots[bias.input[0]], np.clip(exact, -(2**31), 2**31 - 1).astype(np.int32))
        _put(slots[bias.input[1]], steps.astype(np.float32).reshape(tuple(slots[bias.input[1]].dims)))


def _padded(
    value: Array, slot: onnx.TensorProto, quantize: onnx.NodeProto | None, producer: Mapping[str, onnx.NodeProto]
) -> Array:
    """The weight with the zero channels that `onnx_graph.pad_stem` gave its layer."""
    before = producer.get(quantize.input[0]) if quantize is not None else None
    if before is None or before.name != STEM_PAD:
        return value
    return np.pad(value, [(0, 0), (0, max(0, slot.dims[1] - value.shape[1])), (0, 0), (0, 0)])


def _put(slot: onnx.TensorProto, value: Array) -> None:
    if value.shape != tuple(slot.dims):
        raise BuildError(f"{slot.name} of the candidate", found=f"shape {value.shape}", expected=f"{tuple(slot.dims)}")
    slot.CopyFrom(numpy_helper.from_array(value, slot.name))
