"""A float ONNX network as the int8 QDQ network that TensorRT fuses: signed, symmetric, per channel, float biases.

TensorRT takes scales from the graph (explicit quantization), so where a Q/DQ pair stands decides what is fused. Quantized are the
inputs and the weights of layers; not their outputs, so that Conv, sum and ReLU become one kernel, whose int8 output is the next
layer's input. Of a residual sum with a convolution one operand is quantized, the shortcut: with none of them quantized the sum is
a kernel of its own, with both the convolution cannot take it in. Between linear layers on tokens (residual stream, LayerNorm,
attention's products) everything reads floats. Weights stay float behind a pair of their own, which TensorRT from 8 on folds.
The placement is NVIDIA's for residual networks (tensorflow-quantization, "ResNetV1QDQCase"); 2026-11.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnxruntime.quantization import QuantType

from ...calibration.ranges import Range
from ..onnx.edit import read_floats
from ..onnx.graph import LAYER_OPS, Graph
from ..onnx.int8 import Recipe, between_token_layers, float_nodes, insert_pairs, without_notes

IR_VERSION = 8  # of opset 18; a higher one adds nothing and is unknown to older parsers
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "QuantizeBias": False,
    "DedicatedQDQPair": False,
    "OpTypesToExcludeOutputQuantization": list(LAYER_OPS),
}


def quantize(model: onnx.ModelProto, ranges: Mapping[str, Range], recipe: Recipe) -> onnx.ModelProto:
    """The QDQ network of a float one, by the ranges of its tensors: each becomes the symmetric range that holds it.

    Of the recipe only the layers that stay in float are used. Equal arguments give equal bytes.

    Raises:
        BuildError: the quantizer refused the network, or a layer to leave in float is not in it.
    """
    excluded = float_nodes(model, recipe)
    taken = [node.name for _, node in Graph(model).layers() if node.name not in excluded]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if taken:
        result = insert_pairs(
            model,
            ranges,
            instead="--precision fp16",
            tensors=shortcuts(model, excluded),
            activation_qType=QuantType.QInt8,
            reduce_range=False,
            nodes_to_quantize=taken,
            nodes_to_exclude=excluded,
            op_types_to_quantize=list(LAYER_OPS),
            extra_options=_OPTIONS,
        )
        result = read_floats(result, between_token_layers(Graph(model)))
    del result.graph.value_info[:]
    result.ir_version = IR_VERSION
    return without_notes(result)


def left_in_float(model: onnx.ModelProto) -> str:
    """A note on the layers with weights that `quantize` does not know; "" without any."""
    graph = Graph(model)
    weighed = [node for node in graph.nodes if node.op_type in (*LAYER_OPS, "ConvTranspose") and graph.weight(node)[0]]
    known = {node.name for _, node in graph.layers()}
    kinds = sorted({node.op_type for node in weighed if node.name not in known})
    left = sum(node.name not in known for node in weighed)
    return f"{left} of {len(weighed)} layers with weights stay in float ({', '.join(kinds)})" if left else ""


def shortcuts(model: onnx.ModelProto, excluded: list[str]) -> Iterator[str]:
    """Tensors that need a pair of their own: the shortcut of each sum with a convolution that no layer quantizes.

    Where both operands come from convolutions, the branch with fewer nodes back to where the two part is the shortcut.
    """
    graph = Graph(model)
    producer = graph.producer
    layers = {node.name: node for _, node in graph.layers() if node.name not in excluded}
    taken = {name for name, node in layers.items() if node.op_type == "Conv"}
    quantized = {node.input[0] for node in layers.values()}
    for node in graph.nodes:
        if node.op_type != "Add" or any(name in graph.constants for name in node.input):
            continue
        from_conv = [name in producer and producer[name].name in taken for name in node.input]
        if not any(from_conv) or any(name in quantized for name in node.input):
            continue
        first, second = node.input
        if all(from_conv):
            yield first if _depth(first, second, producer) < _depth(second, first, producer) else second
        else:
            yield second if from_conv[0] else first


def _depth(tensor: str, other: str, producer: Mapping[str, onnx.NodeProto]) -> int:
    """Nodes on the shortest way back from a tensor to anything that the other tensor comes from too."""
    theirs, todo = set[str](), [other]
    while todo:
        name = todo.pop()
        if name not in theirs:
            theirs.add(name)
            todo += producer[name].input if name in producer else []
    depth, front = 0, {tensor}
    while front and not front & theirs:
        front = {name for at in front if at in producer for name in producer[at].input}
        depth += 1
    return depth
