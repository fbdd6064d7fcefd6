"""An ONNX graph to read: its constants, who computes and who uses each tensor, shapes, and which operators are layers."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import cached_property
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

LAYER_OPS = ("Conv", "Gemm", "MatMul")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_SMALL = 64  # elements; shape inference reads the values of nothing larger


class Graph:
    """The nodes of a model and the maps between nodes and tensors, as they are when it is made."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {i.name: i for i in model.graph.initializer}
        self._connect(list(model.graph.node))

    def _connect(self, nodes: list[onnx.NodeProto]) -> None:
        self.nodes = nodes
        self.producer = {name: node for node in nodes for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in nodes:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)

    def copy(self) -> Graph:
        """The same graph with nodes that are free to be changed; constants and shapes are shared."""
        holder = onnx.GraphProto()
        holder.node.extend(self.nodes)
        same = copy.copy(self)
        same._connect(list(holder.node))
        return same

    def layers(self) -> list[tuple[str, onnx.NodeProto]]:
        """Every Conv, Gemm and MatMul with a constant weight, by the name of its module, in the order of the nodes.

        The weight's initializer is `LAYER.weight`, or `LAYER.weight_quantized` behind a DequantizeLinear; what has no such name
        goes by all of it. A layer that is called several times comes as often. Products with stacks of matrices are no layers.
        """
        found = []
        for node in self.nodes:
            weight = self.weight(node)[0] if node.op_type in LAYER_OPS else ""
            if weight and (node.op_type == "Conv" or len(self.constants[weight].dims) == 2):
                found.append((weight.removesuffix("_quantized").removesuffix(".weight"), node))
        return found

    def weight(self, node: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]]:
        """The constant a layer's weight comes from, "" if it is computed, and the quantizers between them, last first."""
        return self.source(node.input[1]) if len(node.input) > 1 else ("", [])

    def source(self, tensor: str) -> tuple[str, list[onnx.NodeProto]]:
        """The constant a tensor is, directly or through quantizers, "" if it is computed; and the quantizers, last first."""
        between: list[onnx.NodeProto] = []
        while tensor in self.producer and self.producer[tensor].op_type in (QUANTIZE, DEQUANTIZE):
            between.append(self.producer[tensor])
            tensor = between[-1].input[0]
        return (tensor if tensor in self.constants else ""), between

    def array(self, constant: str) -> Array | None:
        """A constant's value; None where the tensor is not a constant."""
        return numpy_helper.to_array(self.constants[constant]) if constant in self.constants else None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, batch 1, as far as it can be inferred."""
        model = onnx.ModelProto(ir_version=self.model.ir_version)
        model.opset_import.extend(self.model.opset_import)
        graph, sizes = model.graph, {}
        graph.name = "shapes"
        graph.node.extend(self.model.graph.node)
        graph.input.extend(self.model.graph.input)
        for value in graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = 1
        for name, constant in self.constants.items():
            sizes[name] = tuple(constant.dims)
            if len(constant.dims) < 2 and sum(constant.dims) <= _SMALL:
                graph.initializer.append(constant)
            else:  # without its values: only the shape is asked for
                graph.input.append(helper.make_tensor_value_info(name, constant.data_type, constant.dims))
        for output in self.model.graph.output:
            graph.output.add().name = output.name
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.tensor_type.HasField("shape"):
                sizes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        return sizes


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def output_axis(node: onnx.NodeProto) -> int:
    """The axis of a layer's weight that counts its outputs."""
    return 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0)) else 0
