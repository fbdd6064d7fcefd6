"""Edits of ONNX graphs without torch, float or QDQ: leave branches out, change constants, suit it to the runtime's int8 kernels.

All functions leave their argument as it is. A layer is a Conv, Gemm or MatMul whose weight initializer is called
`LAYER.weight`, or `LAYER.weight_quantized` behind a DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .graph import DEQUANTIZE, LAYER_OPS, QUANTIZE, Array, Graph, attribute

STEM_PAD = "stem_pad"  # node that widens the image to whole groups of input channels
BIAS_AXES = "bias_axes"
_PASS_SIGN = ("MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Flatten", "Reshape", "Transpose", "Squeeze")


def pad_stem(model: onnx.ModelProto, multiple: int = 4) -> onnx.ModelProto:
    """The same function with the image widened by zero channels to a multiple that the int8 kernels take.

    ONNX Runtime's direct int8 convolution (MLAS `ConvSym`) needs input channels in fours; three colour channels send the
    first convolution through im2col, which took longer than any other layer of ResNet-20. The added weights are zero.
    """
    editor = OnnxEditor(model)
    image = model.graph.input[0].name
    readers = editor.graph.consumers[image]
    if len(readers) != 1 or readers[0].op_type != "Conv" or attribute(readers[0], "group", 1) != 1:
        return model
    stem = readers[0]
    dims = editor.dims(stem.input[1])
    missing = -dims[1] % multiple
    if not missing or len(dims) != 4:  # MLAS has that kernel for images alone
        return model
    editor.put(stem.input[1], np.pad(editor.array(stem.input[1]), [(0, 0), (0, missing), (0, 0), (0, 0)]))
    editor.put(f"{STEM_PAD}_sizes", np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64))
    stem.input[0] = f"{image}_padded"
    pad = helper.make_node("Pad", [image, f"{STEM_PAD}_sizes"], [f"{image}_padded"], name=STEM_PAD)
    editor.ops.insert(next(i for i, node in enumerate(editor.ops) if node is stem), pad)
    return editor.build()


def bias_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with the biases of linear layers on tokens (1, 1, outputs), by an operator that is folded on loading.

    Where a bias is (outputs,), ONNX Runtime makes one Gemm of product and bias before it looks for int8 layers. If the layer's
    output is in float, that Gemm is too, and its weights are dequantized at every call: twice as slow as without int8.
    """
    editor = OnnxEditor(model)
    graph = editor.graph
    for node in [node for node in editor.ops if node.op_type == "Add"]:
        for at, other in ((0, 1), (1, 0)):
            product, bias = graph.producer.get(node.input[other]), node.input[at]
            linear = product is not None and product.op_type == "MatMul" and bool(graph.weight(product)[0])
            if linear and bias in graph.constants and len(editor.dims(bias)) == 1:
                editor.put(BIAS_AXES, np.array([0, 1], np.int64))
                apart = helper.make_node("Unsqueeze", [bias, BIAS_AXES], [f"{bias}_apart"], name=f"{node.name}_bias")
                editor.ops.insert(next(i for i, op in enumerate(editor.ops) if op is node), apart)
                node.input[at] = apart.output[0]
                break
    return editor.build()


def read_floats(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The QDQ graph in which nodes of these names read activations themselves, not what is left of them after a Q/DQ pair.

    ONNX Runtime's quantizer gives a pair to all that read a tensor, a float residual beside an int8 layer too.
    """
    editor = OnnxEditor(model)
    for node in editor.ops:
        for at, name in enumerate(node.input if node.name in names else ()):
            constant, pair = editor.graph.source(name)
            if not constant and len(pair) == 2:
                node.input[at] = pair[-1].input[0]
    editor.drop_dead()
    return editor.build()


def bare_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The QDQ graph without the quantization of a linear layer's output that is the network's output.

    The int8 Gemm kernel can give floats: one operation less, and the logits keep their digits.
    """
    editor = OnnxEditor(model)
    producer = editor.graph.producer
    for output in editor.outputs:
        last = producer.get(output)
        before = producer.get(last.input[0]) if last is not None and last.op_type == DEQUANTIZE else None
        layer = producer.get(before.input[0]) if before is not None and before.op_type == QUANTIZE else None
        if layer is not None and layer.op_type in ("Gemm", "MatMul") and len(editor.graph.consumers[layer.output[0]]) == 1:
            editor.ops = [node for node in editor.ops if node is not last and node is not before]
            layer.output[0] = output
    return editor.build()


class OnnxEditor:
    """An ONNX graph with nodes of its own; constants are shared with the dense one, and copied only by `build`."""

    def __init__(self, dense: Graph | onnx.ModelProto) -> None:
        dense = dense if isinstance(dense, Graph) else Graph(dense)
        self.model, self.constants = dense.model, dense.constants
        self.graph = dense.copy()
        self.ops = self.graph.nodes
        self.outputs = [o.name for o in self.model.graph.output]
        self._fresh: dict[str, Array] = {}  # new values

    def build(self) -> onnx.ModelProto:
        """The edited graph as a model of its own, with the constants it needs."""
        old = self.model
        constants = [
            numpy_helper.from_array(np.ascontiguousarray(self.array(name)), name) if name in self._fresh else self.constants[name]
            for name in self.used_constants()
        ]
        graph = helper.make_graph(self.ops, old.graph.name, old.graph.input, old.graph.output, constants)
        about = {"producer_name": old.producer_name, "producer_version": old.producer_version, "ir_version": old.ir_version}
        new = helper.make_model(graph, opset_imports=old.opset_import, **about)
        new.metadata_props.extend(old.metadata_props)
        return new

    def used_constants(self) -> list[str]:
        """The constants that the graph still reads."""
        used = {name for node in self.ops for name in node.input}
        return [name for name in dict.fromkeys((*self.constants, *self._fresh)) if name in used]

    def array(self, constant: str) -> Array:
        """A constant's value as far as the graph has been edited."""
        if constant in self._fresh:
            return self._fresh[constant]
        value: Array = numpy_helper.to_array(self.constants[constant])
        return value

    def dims(self, constant: str) -> tuple[int, ...]:
        """Its shape."""
        return self._fresh[constant].shape if constant in self._fresh else tuple(self.constants[constant].dims)

    def put(self, constant: str, value: Array) -> None:
        """Give a constant another value."""
        self._fresh[constant] = value

    def value(self, tensor: str) -> Array | None:
        """A constant's value, behind a DequantizeLinear the integers; None for an activation."""
        constant, _ = self.graph.source(tensor)
        return self.array(constant) if constant else None

    def drop_dead(self) -> None:
        """Remove operators whose results are unused."""
        wanted, kept = set(self.outputs), []
        for op in reversed(self.ops):
            if wanted.intersection(filter(None, op.output)):  # omitted ones have no name
                kept.append(op)
                wanted.update(op.input)
        self.ops = kept[::-1]

    def bypass(self, branch: str, add: onnx.NodeProto) -> None:
        """Let what reads a sum read the operand that is not `branch`; where there was one, no requantization is left behind."""
        shortcut = add.input[1] if add.input[0] == branch else add.input[0]
        end, clips = add.output[0], False
        relu = self._only_user(end, "Relu", "Clip")
        if relu is not None:
            end, clips = relu.output[0], True
        quantize = self._only_user(end, QUANTIZE)
        clips = clips or (quantize is not None and self._zero_at_bottom(quantize))
        if clips and not self._non_negative(shortcut):
            # the clipping after the sum must stay: it takes the shortcut as it was before its own quantization
            self._rewire(add.output[0], self._before_quantization(shortcut))
        elif quantize is None:
            self._rewire(end, shortcut)
        elif any(node.output[0] in self.outputs for node in self.graph.consumers[quantize.output[0]]):
            quantize.input[0] = shortcut  # the network's output keeps its name
        else:
            for dequantize in list(self.graph.consumers[quantize.output[0]]):
                readers = list(self.graph.consumers[dequantize.output[0]])
                self._rewire(dequantize.output[0], shortcut)
                for reader in readers:
                    self._rescale_bias(reader)

    def _rewire(self, old: str, new: str) -> None:
        """Redirect all uses of `old` to `new`."""
        for node in self.graph.consumers.pop(old, []):
            for slot, name in enumerate(node.input):
                if name == old:
                    node.input[slot] = new
            self.graph.consumers[new].append(node)

    def _only_user(self, tensor: str, *kinds: str) -> onnx.NodeProto | None:
        """The one node that uses a tensor, if it is of one of these kinds."""
        users = self.graph.consumers[tensor]
        return users[0] if tensor not in self.outputs and len(users) == 1 and users[0].op_type in kinds else None

    def _rescale_bias(self, node: onnx.NodeProto) -> None:
        """A layer's int32 bias again in steps of input scale times weight scale: other steps keep it from the int8 kernels."""
        data, weight, bias = (self.graph.producer.get(name) for name in (*node.input, "", "")[:3])
        if node.op_type not in LAYER_OPS or data is None or weight is None or bias is None:
            return
        if any(source.op_type != DEQUANTIZE or source.input[1] not in self.constants for source in (data, weight, bias)):
            return
        old = self.array(bias.input[1])
        new = np.asarray(self.array(data.input[1]) * self.array(weight.input[1]), dtype=np.float32).reshape(old.shape)
        self.put(bias.input[0], np.rint(self.array(bias.input[0]) * (old.astype(np.float64) / new)).astype(np.int32))
        self.put(bias.input[1], new)

    def _zero_at_bottom(self, quantize: onnx.NodeProto) -> bool:
        """Whether a QuantizeLinear clips what is negative: a Relu that was folded into it."""
        zero = self.graph.array(quantize.input[2]) if len(quantize.input) > 2 else None
        return zero is not None and zero.dtype == np.uint8 and not zero.any()

    def _non_negative(self, tensor: str) -> bool:
        node = self.graph.producer.get(tensor)
        if node is None:
            return False
        if node.op_type in ("Relu", "Sigmoid"):
            return True
        if node.op_type == "Clip":
            low = self.value(node.input[1]) if len(node.input) > 1 else None
            return low is not None and bool((low >= 0).all())
        if node.op_type == DEQUANTIZE:
            source = self.graph.producer.get(node.input[0])
            return source is not None and (self._zero_at_bottom(source) or self._non_negative(source.input[0]))
        return node.op_type in _PASS_SIGN and self._non_negative(node.input[0])

    def _before_quantization(self, tensor: str) -> str:
        node = self.graph.producer.get(tensor)
        source = self.graph.producer.get(node.input[0]) if node is not None and node.op_type == DEQUANTIZE else None
        return source.input[0] if source is not None and source.op_type == QUANTIZE else tensor
