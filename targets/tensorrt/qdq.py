"""A float ONNX network as the int8 QDQ network that TensorRT fuses: signed, symmetric, per channel, float biases.

TensorRT takes scales from the graph (explicit quantization), so where a Q/DQ pair stands decides what is fused. Quantized are the
inputs and the weights of layers; not their outputs, so that Conv, sum and ReLU become one kernel, whose int8 output is the next
layer's input. Of a residual sum one operand is quantized, the shortcut: with none of them quantized the sum is a kernel of its
own, with both the convolution cannot take it in. Weights stay float behind a pair of their own, which every TensorRT from 8 on
folds. The placement is NVIDIA's for residual networks (tensorflow-quantization, "ResNetV1QDQCase"); 2026-11.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from ...calibration.ranges import Range
from ...pipeline.errors import BuildError
from ..onnx.edit import layers, used_opsets
from ..onnx.graph import LAYER_OPS, Graph
from ..onnx.int8 import Recipe, quiet

IR_VERSION = 8  # of opset 18; a higher one says nothing more and is unknown to older parsers
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "QuantizeBias": False,
    "DedicatedQDQPair": False,
    "OpTypesToExcludeOutputQuantization": list(LAYER_OPS),
}


def quantize(model: onnx.ModelProto, ranges: Mapping[str, Range], recipe: Recipe) -> onnx.ModelProto:
    """The QDQ network. Equal arguments give equal bytes.

    Args:
        model: a float network with its layers named, see `onnx_graph`.
        ranges: of its tensors, by name; each becomes the symmetric range that holds it.
        recipe: which layers stay in float; weights have 8 bits here.

    Raises:
        BuildError: the quantizer refused the network, or a layer to leave in float is not in it.
    """
    found = layers(model)
    unknown = [name for name in recipe.float_layers if name not in found]
    if unknown:
        raise BuildError(f"layer {unknown[0]} cannot be left in float", found="no such layer in the exported graph")
    excluded = [found[name].node for name in recipe.float_layers]
    taken = [layer.node for layer in found.values() if layer.node not in excluded]
    shaped = onnx.shape_inference.infer_shapes(model)
    add_infer_metadata(shaped)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    if taken:
        try:
            with quiet():
                quantizer = QDQQuantizer(
                    shaped,
                    per_channel=True,
                    reduce_range=False,
                    weight_qType=QuantType.QInt8,
                    activation_qType=QuantType.QInt8,
                    tensors_range=TensorsData(CalibrationMethod.MinMax, data),
                    nodes_to_quantize=taken,
                    nodes_to_exclude=excluded,
                    op_types_to_quantize=list(LAYER_OPS),
                    extra_options=_OPTIONS,
                )
                for tensor in shortcuts(model, excluded):
                    quantizer.quantize_activation_tensor(tensor)
                quantizer.quantize_model()
                quantizer.model.topological_sort()
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
            raise BuildError(
                "onnxruntime.quantization refused the network", found=str(error), do="try --precision fp16"
            ) from error
        shaped = quantizer.model.model
    result = onnx.ModelProto()
    result.CopyFrom(shaped)
    del result.metadata_props[:]
    del result.graph.value_info[:]
    opsets = used_opsets(result)
    del result.opset_import[:]
    result.opset_import.extend(opsets)
    result.ir_version = IR_VERSION
    return result


def shortcuts(model: onnx.ModelProto, excluded: list[str]) -> Iterator[str]:
    """Tensors that need a pair of their own: of each sum of a layer with something else that no layer quantizes, the something.

    Where both operands come from layers, the branch with fewer nodes back to where the two part is the shortcut.

    Args:
        model: the float network.
        excluded: names of nodes that stay in float.
    """
    graph = Graph(model)
    producer = graph.producer
    taken = {node.name for node in graph.nodes if node.op_type in LAYER_OPS} - set(excluded)
    quantized = {node.input[0] for node in graph.nodes if node.name in taken}
    for node in graph.nodes:
        if node.op_type != "Add" or any(name in graph.constants for name in node.input):
            continue
        from_layer = [name in producer and producer[name].name in taken for name in node.input]
        if not any(from_layer) or any(name in quantized for name in node.input):
            continue
        first, second = node.input
        if all(from_layer):
            yield first if _depth(first, second, producer) < _depth(second, first, producer) else second
        else:
            yield second if from_layer[0] else first


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
