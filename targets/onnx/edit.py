"""Edits of ONNX graphs without torch: cut a float or QDQ network to a structure, suit it to the runtime's int8 kernels.

All functions leave their argument as it is. A layer is a Conv, Gemm or MatMul whose weight initializer is called
`LAYER.weight`, or `LAYER.weight_quantized` behind a DequantizeLinear.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ...pipeline.errors import BuildError
from ..base import Structure

Array = NDArray[Any]

LAYER_OPS = ("Conv", "Gemm", "MatMul")
STEM_PAD = "stem_pad"  # node that widens the image to whole groups of input channels
_PASS_SIGN = ("MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Flatten", "Reshape", "Transpose", "Squeeze")
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "PRelu")


@dataclass(frozen=True)
class Layer:
    """A layer as it stands in a graph."""

    name: str  # module name
    node: str  # node name
    inputs: int
    outputs: int
    kernel: int  # kernel positions: 9 for 3x3, 1 for a linear layer
    groups: int
    output: str  # tensor


def layers(model: onnx.ModelProto) -> dict[str, Layer]:
    """The layers of a graph by module name, in the order they run."""
    editor = _Editor(model)
    found = {}
    for name, node in editor.layers.items():
        dims = editor.constants[editor.weight_of(node)].dims
        groups = _attribute(node, "group", 1)
        if node.op_type == "Conv":
            size = (dims[1] * groups, dims[0], int(np.prod(dims[2:])))
        else:
            size = (dims[0], dims[1], 1) if _output_axis(node) else (dims[1], dims[0], 1)
        found[name] = Layer(name, node.name, *size, groups, node.output[0])
    return found


def cut(model: onnx.ModelProto, structure: Structure) -> onnx.ModelProto:
    """The network with only the first channels of every layer and without the removed branches.

    Which channels stay does not change what a network costs, so the first ones do. Works on float and on QDQ graphs: scales,
    zero points, biases and BatchNorm are cut with their weights. Where a removed branch was added to its shortcut, whatever
    used the sum uses the shortcut; no requantization is left behind. Layers that are not named stay as they are, and so do the
    input channels of a layer that reads the image.

    Raises:
        BuildError: a layer is not in the graph, or a removed branch does not end in a sum.
    """
    editor = _Editor(model)
    for name in (*structure.widths, *structure.removed):
        if name not in editor.layers:
            raise BuildError(f"layer {name} is not in the exported graph", do="give it a module of its own in the network")
    for name in structure.removed:
        editor.bypass(name)
    editor.drop_dead()
    editor.narrow(structure)
    return editor.build()


def pad_stem(model: onnx.ModelProto, multiple: int = 4) -> onnx.ModelProto:
    """The same function with the image widened by zero channels to a multiple that the int8 kernels take.

    ONNX Runtime's direct int8 convolution (MLAS `ConvSym`) needs input channels in fours; three colour channels send the
    first convolution through im2col, which took longer than any other layer of ResNet-20. The added weights are zero.
    """
    editor = _Editor(model)
    readers = [node for node in editor.nodes if model.graph.input[0].name in node.input]
    stem = readers[0]
    if len(readers) != 1 or stem.op_type != "Conv" or _attribute(stem, "group", 1) != 1:
        return model
    weight = numpy_helper.to_array(editor.constants[stem.input[1]])
    missing = -weight.shape[1] % multiple
    if not missing:
        return model
    widened = onnx.ModelProto()
    widened.CopyFrom(model)
    graph = widened.graph
    at = next(i for i, node in enumerate(graph.node) if node.name == stem.name)
    zeros = np.zeros((weight.shape[0], missing, *weight.shape[2:]), weight.dtype)
    slot = next(i for i in graph.initializer if i.name == stem.input[1])
    slot.CopyFrom(numpy_helper.from_array(np.concatenate([weight, zeros], axis=1), slot.name))
    pads = np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64)
    graph.initializer.append(numpy_helper.from_array(pads, f"{STEM_PAD}_sizes"))
    source = stem.input[0]
    graph.node[at].input[0] = f"{source}_padded"
    graph.node.insert(at, helper.make_node("Pad", [source, f"{STEM_PAD}_sizes"], [f"{source}_padded"], name=STEM_PAD))
    return widened


def bare_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The QDQ graph without the quantization of a linear layer's output that is the network's output.

    The int8 Gemm kernel can give floats: one operation less, and the logits keep their digits.
    """
    editor = _Editor(model)
    for output in editor.outputs:
        last = editor.producer.get(output)
        before = editor.producer.get(last.input[0]) if last is not None and last.op_type == "DequantizeLinear" else None
        layer = editor.producer.get(before.input[0]) if before is not None and before.op_type == "QuantizeLinear" else None
        if layer is not None and layer.op_type in ("Gemm", "MatMul") and len(editor.consumers[layer.output[0]]) == 1:
            editor.nodes = [node for node in editor.nodes if node is not last and node is not before]
            layer.output[0] = output
    return editor.build()


class _Editor:
    """A graph's nodes, copied, with who makes and who uses each tensor; constants are copied only into the result."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {i.name: i for i in model.graph.initializer}
        self.changed: dict[str, Array] = {}
        copied = onnx.GraphProto()
        copied.node.extend(model.graph.node)
        self.nodes: list[onnx.NodeProto] = list(copied.node)
        self.outputs = [o.name for o in model.graph.output]
        self.inputs = {i.name for i in model.graph.input}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in set(node.input):
                self.consumers[name].append(node)
        self.layers: dict[str, onnx.NodeProto] = {}
        for node in self.nodes:
            weight = self.weight_of(node) if node.op_type in LAYER_OPS else ""
            for suffix in (".weight", ".weight_quantized"):
                if weight.endswith(suffix):
                    self.layers[weight.removesuffix(suffix)] = node

    def weight_of(self, node: onnx.NodeProto) -> str:
        """Name of the initializer with the layer's weights, or "" if they are computed."""
        return self.constant_behind(node.input[1]) if len(node.input) > 1 else ""

    def constant_behind(self, tensor: str) -> str:
        """The initializer a tensor is, directly or dequantized; "" if it is none."""
        source = self.producer.get(tensor)
        name = source.input[0] if source is not None and source.op_type == "DequantizeLinear" else tensor
        return name if name in self.constants else ""

    def rewire(self, old: str, new: str) -> None:
        """Whatever uses `old` uses `new`."""
        for node in self.consumers.pop(old, []):
            for slot, name in enumerate(node.input):
                if name == old:
                    node.input[slot] = new
            self.consumers[new].append(node)

    def only_user(self, tensor: str, *kinds: str) -> onnx.NodeProto | None:
        """The one node that uses a tensor, if it is of one of these kinds (or of any)."""
        users = self.consumers[tensor]
        if tensor in self.outputs or len(users) != 1 or (kinds and users[0].op_type not in kinds):
            return None
        return users[0]

    def bypass(self, name: str) -> None:
        """Take the residual branch that ends in this layer out of the sum it is added to."""
        branch, add = self._sum_after(name)
        shortcut = add.input[1] if add.input[0] == branch else add.input[0]
        end, clips = add.output[0], False
        relu = self.only_user(end, "Relu", "Clip")
        if relu is not None:
            end, clips = relu.output[0], True
        quantize = self.only_user(end, "QuantizeLinear")
        clips = clips or (quantize is not None and self._zero_at_bottom(quantize))
        if clips and not self._non_negative(shortcut):
            # the clipping after the sum must stay: it takes the shortcut as it was before its own quantization
            self.rewire(add.output[0], self._before_quantization(shortcut))
        elif quantize is None:
            self.rewire(end, shortcut)
        else:
            for dequantize in list(self.consumers[quantize.output[0]]):
                readers = list(self.consumers[dequantize.output[0]])
                self.rewire(dequantize.output[0], shortcut)
                for reader in readers:
                    self._rescale_bias(reader)

    def _sum_after(self, name: str) -> tuple[str, onnx.NodeProto]:
        """The sum of what a layer gives with something else, and the operand that comes from the layer."""
        derived = {self.layers[name].output[0]}
        for node in self.nodes:  # in the order they run
            mine = [i for i in node.input if i in derived]
            if not mine:
                continue
            if self._is_sum(node) and len(set(node.input)) == 2 and len(mine) == 1:
                return mine[0], node
            if node.op_type in (*LAYER_OPS, "Concat"):
                break
            derived.update(node.output)
        raise BuildError(f"the branch that ends in {name} cannot be removed", found="no sum after it", expected="a shortcut")

    def drop_dead(self) -> None:
        """Take out nodes whose results nobody uses."""
        wanted, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        self.nodes = kept[::-1]

    def narrow(self, structure: Structure) -> None:
        """Cut layers to their widths, and what acts on single channels to what is left of them."""
        names = {node.output[0]: name for name, node in self.layers.items()}
        channels: dict[str, int] = {}  # tensor -> channels, where it is known
        for node in self.nodes:
            out = node.output[0]
            if out in names:
                if names[out] in structure.widths:
                    inputs, outputs = structure.widths[names[out]]
                    self._narrow_layer(node, inputs, outputs)
                    channels[out] = outputs
                else:
                    weight = self.constants[self.weight_of(node)]
                    channels[out] = weight.dims[_output_axis(node)]
                continue
            if node.op_type == "Concat" and _attribute(node, "axis", 1) == 1 and all(i in channels for i in node.input):
                channels[out] = sum(channels[i] for i in node.input)
                continue
            if node.op_type in (*LAYER_OPS, "Flatten", "Reshape", "Concat", "Squeeze", "Transpose"):
                continue  # channels change or move: whatever comes after is a layer, cut by its own widths
            data = next((name for name in node.input if name in channels), None)
            if data is None:
                continue
            channels[out] = channels[data]
            matmul = self.producer[data].op_type in ("MatMul", "Gemm") if data in self.producer else False
            for operand in node.input:
                constant = self.constant_behind(operand)
                if not constant:
                    continue
                rank = len(self.constants[constant].dims)
                if node.op_type == "BatchNormalization" or (node.op_type in _ELEMENTWISE and rank == 1 and matmul):
                    self._cut(operand, 0, channels[data])
                elif node.op_type in _ELEMENTWISE and rank >= 3:
                    self._cut(operand, rank - 3, channels[data])

    def build(self) -> onnx.ModelProto:
        """The edited graph as a model of its own, with the constants it needs."""
        new = onnx.ModelProto(ir_version=self.model.ir_version, producer_name=self.model.producer_name)
        new.producer_version = self.model.producer_version
        new.opset_import.extend(self.model.opset_import)
        new.metadata_props.extend(self.model.metadata_props)
        graph = new.graph
        graph.name = self.model.graph.name
        graph.input.extend(self.model.graph.input)
        graph.output.extend(self.model.graph.output)
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        for name, constant in self.constants.items():
            if name in used:
                fresh = self.changed.get(name)
                graph.initializer.append(constant if fresh is None else numpy_helper.from_array(fresh, name))
        return new

    def _rescale_bias(self, node: onnx.NodeProto) -> None:
        """A layer's int32 bias again in steps of input scale times weight scale: other steps keep it from the int8 kernels."""
        data, weight, bias = (self.producer.get(name) for name in (*node.input, "", "")[:3])
        if node.op_type not in LAYER_OPS or data is None or weight is None or bias is None:
            return
        if any(source.op_type != "DequantizeLinear" or source.input[1] not in self.constants for source in (data, weight, bias)):
            return
        old = self._value(bias.input[1])
        new = np.asarray(self._value(data.input[1]) * self._value(weight.input[1]), dtype=np.float32).reshape(old.shape)
        self.changed[bias.input[0]] = np.rint(self._value(bias.input[0]) * (old.astype(np.float64) / new)).astype(np.int32)
        self.changed[bias.input[1]] = new

    def _value(self, constant: str) -> Array:
        fresh = self.changed.get(constant)
        return numpy_helper.to_array(self.constants[constant]) if fresh is None else fresh

    def _is_sum(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Add" and not any(map(self.constant_behind, node.input))

    def _zero_at_bottom(self, quantize: onnx.NodeProto) -> bool:
        """Whether a QuantizeLinear clips what is negative: a Relu that was folded into it."""
        zero = self.constants.get(quantize.input[2]) if len(quantize.input) > 2 else None
        return zero is not None and zero.data_type == onnx.TensorProto.UINT8 and not numpy_helper.to_array(zero).any()

    def _non_negative(self, tensor: str) -> bool:
        node = self.producer.get(tensor)
        if node is None:
            return False
        if node.op_type in ("Relu", "Sigmoid"):
            return True
        if node.op_type == "Clip":
            low = self.constant_behind(node.input[1]) if len(node.input) > 1 else ""
            return bool(low) and bool((numpy_helper.to_array(self.constants[low]) >= 0).all())
        if node.op_type == "DequantizeLinear":
            source = self.producer.get(node.input[0])
            return source is not None and (self._zero_at_bottom(source) or self._non_negative(source.input[0]))
        return node.op_type in _PASS_SIGN and self._non_negative(node.input[0])

    def _before_quantization(self, tensor: str) -> str:
        node = self.producer.get(tensor)
        source = self.producer.get(node.input[0]) if node is not None and node.op_type == "DequantizeLinear" else None
        return source.input[0] if source is not None and source.op_type == "QuantizeLinear" else tensor

    def _reads_image(self, node: onnx.NodeProto) -> bool:
        source: onnx.NodeProto | None = node
        while source is not None and source.input[0] not in self.inputs:
            source = self.producer.get(source.input[0])
            if source is None or source.op_type not in ("Pad", "QuantizeLinear", "DequantizeLinear", "Identity"):
                return False
        return source is not None

    def _narrow_layer(self, node: onnx.NodeProto, inputs: int, outputs: int) -> None:
        weight, out_axis = node.input[1], _output_axis(node)
        groups = _attribute(node, "group", 1)
        if groups > 1 and self.constants[self.constant_behind(weight)].dims[1] == 1:  # depthwise: as many groups as inputs
            next(a for a in node.attribute if a.name == "group").i = inputs
        elif not self._reads_image(node):
            self._cut(weight, 1 - out_axis, inputs // groups)
        self._cut(weight, out_axis, outputs)
        if len(node.input) > 2:
            self._cut(node.input[2], 0, outputs)

    def _cut(self, tensor: str, axis: int, size: int) -> None:
        """Keep the first `size` entries of a constant along an axis, with its scales and zero points if they run along it."""
        source = self.producer.get(tensor)
        if source is None:
            self._cut_constant(tensor, axis, size)
            return
        self._cut_constant(source.input[0], axis, size)
        if _attribute(source, "axis", 1) % len(self.constants[source.input[0]].dims) == axis:
            for name in source.input[1:]:
                if len(self.constants[name].dims) == 1:
                    self._cut_constant(name, 0, size)

    def _cut_constant(self, name: str, axis: int, size: int) -> None:
        array = self.changed.get(name)
        if array is None:
            if self.constants[name].dims[axis] <= size:
                return
            array = numpy_helper.to_array(self.constants[name])
        if array.shape[axis] > size:
            self.changed[name] = np.ascontiguousarray(array[(slice(None),) * axis + (slice(0, size),)])


def used_opsets(model: onnx.ModelProto) -> list[onnx.OperatorSetIdProto]:
    """The operator sets a graph's nodes belong to; tools leave more than are used."""
    domains = {node.domain for node in model.graph.node}
    return [entry for entry in model.opset_import if entry.domain in domains]


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _output_axis(node: onnx.NodeProto) -> int:
    """The axis of the weight that counts outputs."""
    return 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB", 0)) else 0
