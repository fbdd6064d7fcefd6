"""New values for the layers of an ONNX graph, float or QDQ: quantizing a network again without the quantizer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...calibration.ranges import least_weight_scale
from ...pipeline.errors import BuildError
from .edit import STEM_PAD, OnnxEditor
from .graph import DEQUANTIZE, LAYER_OPS, Array, attribute


def fill(editor: OnnxEditor, values: Mapping[str, Array], weight_steps: int = 127) -> None:
    """Write values into the constants of a graph that is being edited.

    Values are by the name of their initializer in the float graph, weights as `LAYER.weight`; what is not named stays. In a QDQ
    graph weights are quantized symmetrically with scales of their own, `weight_steps` (`int8.STEPS`) to each side of zero, and
    biases in steps of input scale times weight scale, as the kernels want.

    Raises:
        BuildError: the shape of a value is not that of its place.
    """
    used = set(editor.used_constants())
    for name, value in values.items():
        if name in used:
            _put(editor, name, value)
    producer = editor.graph.producer
    for node in editor.ops:
        if node.op_type not in (*LAYER_OPS, "BatchNormalization"):
            continue
        sources = [producer.get(tensor) for tensor in (*node.input, "")[:3]]
        data, weight, bias = (s if s is not None and s.op_type == DEQUANTIZE else None for s in sources)
        name = weight.input[0].removesuffix("_quantized") if weight is not None else ""
        if weight is None or name not in values:
            continue
        weights, dims = values[name], editor.dims(weight.input[0])
        quantize = producer.get(data.input[0]) if data is not None else None
        before = producer.get(quantize.input[0]) if quantize is not None else None
        if before is not None and before.name == STEM_PAD:
            weights = np.pad(weights, [(0, 0), (0, max(0, dims[1] - weights.shape[1])), (0, 0), (0, 0)])
        axis = attribute(weight, "axis", 1) % weights.ndim if editor.dims(weight.input[1]) else None
        largest = np.abs(weights).max(axis=tuple(i for i in range(weights.ndim) if i != axis), keepdims=True)
        scale = largest / weight_steps
        scale[scale < np.finfo(np.float32).tiny] = 1.0  # as the quantizer does
        exact = values[bias.input[0].removesuffix("_quantized")] if bias is not None and data is not None else None
        if exact is not None and data is not None:
            least = least_weight_scale(exact, editor.array(data.input[1]).item())
            scale = np.maximum(scale, least.max() if axis is None else least.reshape(scale.shape))
        scale = scale.astype(np.float32)
        _put(editor, weight.input[0], np.rint(weights / scale).astype(np.int8))
        _put(editor, weight.input[1], scale.reshape(editor.dims(weight.input[1])))
        if exact is None or bias is None or data is None:
            continue
        steps = editor.array(data.input[1]) * scale.reshape(-1).astype(np.float64)
        _put(editor, bias.input[0], np.rint(exact / steps).astype(np.int32))
        _put(editor, bias.input[1], steps.astype(np.float32).reshape(editor.dims(bias.input[1])))


def _put(editor: OnnxEditor, name: str, value: Array) -> None:
    if value.shape != editor.dims(name):
        raise BuildError(f"{name} of the candidate", found=f"shape {value.shape}", expected=f"{editor.dims(name)}")
    editor.put(name, value)
