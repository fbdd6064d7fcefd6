"""Takes additions of zeros out of a graph: what is left of residual branches that were left out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

_KEPT = {"Cast", "Expand", "Flatten", "Identity", "Neg", "Relu", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def drop_zero_additions(model: onnx.ModelProto) -> None:
    """Replaces `x + 0` by `x` in place, where it has the shape of `x`, and removes the operators that only made the zero.

    A zero is followed through operators that keep it: reshaping, transposing, and products. Products are trusted to be finite.
    """
    graph = model.graph
    zero = _zeros(graph)
    if not zero:
        return
    shapes = _shapes(onnx.shape_inference.infer_shapes(model).graph)
    instead: dict[str, str] = {}
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = instead.get(name, name)
        if node.op_type != "Add" or node.output[0] in outputs:
            continue
        for term, other in (node.input, reversed(node.input)):
            if term in zero and shapes.get(other) is not None and shapes.get(other) == shapes.get(node.output[0]):
                instead[node.output[0]] = other
                break
    if instead:
        _remove_unread(graph)


def _zeros(graph: onnx.GraphProto) -> set[str]:
    """Names of float tensors that are zero everywhere."""
    found = {i.name for i in graph.initializer if i.data_type in _FLOATS and not numpy_helper.to_array(i).any()}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            value = next((numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"), np.zeros(1, np.float32))
            keeps = value.dtype.kind == "f" and not value.any()
        elif node.op_type in ("Mul", "Div"):
            keeps = any(name in found for name in node.input[: 2 if node.op_type == "Mul" else 1])
        else:
            keeps = node.op_type in _KEPT and node.input[0] in found
        if keeps:
            found.update(node.output)
    return found


def _shapes(graph: onnx.GraphProto) -> Mapping[str, tuple[int | str, ...]]:
    """Shapes of tensors, where every size is known by number or name."""
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
        if all(sizes) and value.type.tensor_type.HasField("shape"):
            found[value.name] = sizes
    return found


def _remove_unread(graph: onnx.GraphProto) -> None:
    """Removes nodes and initializers that nothing reads, in place; a node that an inner graph may read from stays."""
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        unread = [node for node in graph.node if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    for tensor in [i for i in graph.initializer if i.name not in read]:
        graph.initializer.remove(tensor)
