"""The dense .tflite network, float or int8, cut to a candidate's structure without converting anything again.

Works on the objects of `tflite_file`. What a network costs does not depend on which channels stay, so the first ones do: weights,
biases and their per-channel scales are sliced, every activation behind them gets its new shape, and a removed residual branch
leaves its shortcut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...pipeline.errors import BuildError
from ..base import Structure
from .file import Array, compact, constant, graph_of, op_name
from .layers import LAYER_OPS, layer_ops

# one output, whose channels are those of the inputs
_ARITHMETIC = ("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "ABS", "NEG", "EXP", "SQRT", "RSQRT", "SQUARE", "CAST")
_ACTIVATIONS = (
    "RELU",
    "RELU6",
    "RELU_N1_TO_1",
    "RELU_0_TO_1",
    "PRELU",
    "LEAKY_RELU",
    "ELU",
    "GELU",
    "HARD_SWISH",
    "LOGISTIC",
    "TANH",
)
_POOLING = ("MAX_POOL_2D", "AVERAGE_POOL_2D", "MEAN", "SUM", "REDUCE_MAX", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
_PADDING = ("PAD", "PADV2", "MIRROR_PAD")
_KEEP_CHANNELS = frozenset((*_ARITHMETIC, *_ACTIVATIONS, *_POOLING, *_PADDING, "QUANTIZE", "DEQUANTIZE"))
_SAME_SCALE = frozenset(("MAX_POOL_2D", "AVERAGE_POOL_2D", "PAD", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"))
_NOT_NEGATIVE = frozenset(("RELU", "RELU6", "RELU_0_TO_1", "LOGISTIC"))
RELUS = {1: "RELU", 3: "RELU6"}  # ActivationFunctionType -> the operator that does the same


def cut(model: Any, names: Sequence[str], structure: Structure) -> Any:
    """A network of this structure; the model given is left as it is.

    Args:
        model: the dense network, float or int8.
        names: of its layer operators, see `layer_names`.
        structure: layers that it does not name stay as they are.

    Raises:
        BuildError: a layer is not there, a removed branch does not end in a sum, or channels are lost in front of an operator
            that this does not understand.
    """
    editor = _Editor(model, names)
    for name in (*structure.widths, *structure.removed):
        if name not in editor.layers:
            raise BuildError(f"layer {name} is not in the converted network", do="give it a module of its own")
    for name in structure.removed:
        editor.bypass(name)
    editor.drop_dead()
    editor.narrow(structure)
    return compact(editor.model)


def remaining(model: Any, names: Sequence[str], removed: Sequence[str]) -> list[str]:
    """The layers that are left when residual branches are removed, each given by its last layer."""
    editor = _Editor(model, names)
    for name in removed:
        editor.bypass(name)
    editor.drop_dead()
    return [name for name, op in editor.layers.items() if any(op is kept for kept in editor.graph.operators)]


class _Editor:
    """Copies of a network's operators and tensors; constants are shared with the original until one is cut."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.model = copy.copy(model)
        self.model.buffers = list(model.buffers)
        self.model.operatorCodes = list(model.operatorCodes)
        self.graph = copy.copy(graph_of(model))
        self.graph.tensors = [copy.copy(tensor) for tensor in self.graph.tensors]
        self.graph.operators = [copy.copy(op) for op in self.graph.operators]
        for op in self.graph.operators:
            op.inputs, op.outputs = list(map(int, op.inputs)), list(map(int, op.outputs))
        self.model.subgraphs = [self.graph]
        self.layers = {name: op for name, op in zip(names, layer_ops(self.model), strict=True) if name}
        self.producer = {out: op for op in self.graph.operators for out in op.outputs}

    def kind(self, op: Any) -> str:
        return op_name(self.model, op)

    def users(self, tensor: int) -> list[Any]:
        return [op for op in self.graph.operators if tensor in op.inputs]

    def value(self, tensor: int) -> Array | None:
        return constant(self.model, self.graph.tensors[tensor]) if tensor >= 0 else None

    def bypass(self, name: str) -> None:
        """Take the residual branch that ends in this layer out of the sum it is added to."""
        branch, add = self._sum_after(name)
        shortcut = next(i for i in add.inputs if i != branch)
        activation = add.builtinOptions.fusedActivationFunction
        if activation and not self._not_negative(shortcut):
            if activation not in RELUS:
                raise BuildError(
                    f"the branch that ends in {name} cannot be removed", found=f"activation {activation} after its sum"
                )
            self._become(add, RELUS[activation], [shortcut])
            return
        self._set_scale(shortcut, self.graph.tensors[add.outputs[0]].quantization)
        for op in self.users(add.outputs[0]):
            op.inputs = [shortcut if i == add.outputs[0] else i for i in op.inputs]
        self.graph.operators.remove(add)

    def _sum_after(self, name: str) -> tuple[int, Any]:
        """The sum of what a layer gives with something else, and the operand that comes from the layer."""
        derived = {self.layers[name].outputs[0]}
        start = next(i for i, op in enumerate(self.graph.operators) if op is self.layers[name])
        for op in self.graph.operators[start + 1 :]:
            mine = [i for i in op.inputs if i in derived]
            if not mine:
                continue
            if self.kind(op) == "ADD" and len(mine) == 1 and all(self.value(i) is None for i in op.inputs):
                return mine[0], op
            if self.kind(op) in (*LAYER_OPS, "CONCATENATION"):
                break
            derived.update(op.outputs)
        raise BuildError(f"the branch that ends in {name} cannot be removed", found="no sum after it", expected="a shortcut")

    def _become(self, op: Any, kind: str, inputs: list[int]) -> None:
        """Make an operator another one, without options."""
        from ai_edge_litert import schema_py_generated as schema

        number = getattr(schema.BuiltinOperator, kind)
        codes = self.model.operatorCodes
        at = next((i for i, c in enumerate(codes) if max(c.builtinCode, c.deprecatedBuiltinCode) == number), None)
        if at is None:
            code = schema.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 2
            at = len(codes)
            codes.append(code)
        op.opcodeIndex, op.inputs = at, inputs
        op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.NONE, None

    def _set_scale(self, tensor: int, quantization: Any) -> None:
        """Give an activation another scale, with the operators before it that cannot change scales."""
        self.graph.tensors[tensor].quantization = quantization
        op = self.producer.get(tensor)
        if op is not None and self.kind(op) in _SAME_SCALE:
            self._set_scale(op.inputs[0], quantization)

    def _not_negative(self, tensor: int) -> bool:
        op = self.producer.get(tensor)
        if op is None:
            return False
        if self.kind(op) in _NOT_NEGATIVE or getattr(op.builtinOptions, "fusedActivationFunction", 0) in RELUS:
            return True
        return self.kind(op) in (*_SAME_SCALE, "QUANTIZE", "DEQUANTIZE") and self._not_negative(op.inputs[0])

    def drop_dead(self) -> None:
        """Take out operators whose results nobody uses."""
        wanted, kept = set(map(int, self.graph.outputs)), []
        for op in reversed(self.graph.operators):
            if wanted.intersection(op.outputs):
                kept.append(op)
                wanted.update(op.inputs)
        self.graph.operators = kept[::-1]

    def narrow(self, structure: Structure) -> None:
        """Cut layers to their widths and give every activation its new shape."""
        names = {id(op): name for name, op in self.layers.items()}
        was = [tuple(int(n) for n in t.shape) if t.shape is not None else () for t in self.graph.tensors]
        now = dict(enumerate(was))  # activations' shapes, as they become known
        for op in self.graph.operators:
            name, out = names.get(id(op), ""), op.outputs[0]
            data = op.inputs[0]
            if self.kind(op) in LAYER_OPS:
                now[out] = (*was[out][:-1], self._narrow_layer(op, name, structure, was[data][-1], now[data][-1]))
            elif any(now[i] != was[i] for i in op.inputs if i >= 0):
                now[out] = self._shape_after(op, was, now)
            if now[out] != was[out]:
                self.graph.tensors[out].shape = list(now[out])
                self.graph.tensors[out].shapeSignature = None

    def _shape_after(self, op: Any, was: Sequence[tuple[int, ...]], now: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of what an operator other than a layer gives, some of whose inputs have changed."""
        kind, out, data = self.kind(op), op.outputs[0], op.inputs[0]
        if kind == "RESHAPE":
            return self._reshape(op, was, now)
        if kind == "CONCATENATION":
            axis = op.builtinOptions.axis % len(was[out])
            return tuple(sum(now[i][n] for i in op.inputs) if n == axis else now[data][n] for n in range(len(was[out])))
        if kind == "TRANSPOSE":
            order = self.value(op.inputs[1])
            if order is not None:
                return tuple(now[data][int(n)] for n in order)
        if kind in _KEEP_CHANNELS:
            channels = was[out][-1]
            left = {now[i][-1] for i in op.inputs if i >= 0 and self.value(i) is None and was[i][-1:] == (channels,)}
            if len(left) == 1:
                width = left.pop()
                for slot, i in enumerate(op.inputs):
                    if self.value(i) is not None and kind in (*_ARITHMETIC, "PRELU") and was[i][-1:] == (channels,):
                        op.inputs[slot] = self._sliced(i, {len(was[i]) - 1: width})
                return (*was[out][:-1], width)
        raise BuildError(f"channels cannot be removed in front of the operator {kind}", do="use --pattern weight")

    def _reshape(self, op: Any, was: Sequence[tuple[int, ...]], now: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
        """A new target in which the last axis shrinks with the input."""
        data, out = op.inputs[0], op.outputs[0]
        last, rest = divmod(was[out][-1] * int(np.prod(now[data])), int(np.prod(was[data])))
        if rest:
            raise BuildError("channels cannot be removed in front of this RESHAPE", found=f"{was[data]} to {was[out]}")
        shape = (*was[out][:-1], last)
        if len(op.inputs) > 1 and self.value(op.inputs[1]) is not None:
            op.inputs[1] = self._with_value(op.inputs[1], np.array(shape, np.int32))
        if op.builtinOptions is not None:
            op.builtinOptions = copy.copy(op.builtinOptions)
            op.builtinOptions.newShape = list(shape)
        return shape

    def _narrow_layer(self, op: Any, name: str, structure: Structure, before: int, channels: int) -> int:
        """Cut a layer's constants, given its input channels before and now; how many outputs it has then."""
        kind, weight = self.kind(op), op.inputs[1]
        shape = [int(n) for n in self.graph.tensors[weight].shape]
        inputs, outputs = structure.widths.get(name, (0, 0))
        if kind == "DEPTHWISE_CONV_2D":
            outputs = outputs or shape[3]
            keep = {3: outputs}
            if outputs // channels != op.builtinOptions.depthMultiplier:
                op.builtinOptions = copy.copy(op.builtinOptions)
                op.builtinOptions.depthMultiplier = outputs // channels
        else:
            axis, groups = (1, 1) if kind == "FULLY_CONNECTED" else (3, before // shape[3])
            outputs, inputs = outputs or shape[0], inputs // groups or shape[axis]
            keep = {0: outputs, axis: inputs}
            if inputs * groups != channels:
                found = f"{inputs * groups} inputs of {channels} channels"
                raise BuildError(f"layer {name or kind} of a candidate", found=found, expected="as many")
        op.inputs[1] = self._sliced(weight, keep)
        if len(op.inputs) > 2 and op.inputs[2] >= 0:
            op.inputs[2] = self._sliced(op.inputs[2], {0: outputs})
        return outputs

    def _sliced(self, tensor: int, keep: Mapping[int, int]) -> int:
        """A constant of which only the first entries along some axes stay, with its scales; itself if all do."""
        value, old = self.value(tensor), self.graph.tensors[tensor]
        if value is None:
            raise BuildError("weights that are computed cannot be cut", found=str(old.name), do="use --pattern weight")
        if all(value.shape[axis] <= size for axis, size in keep.items()):
            return tensor
        new = self._with_value(tensor, value[tuple(slice(0, keep.get(axis)) for axis in range(value.ndim))])
        quantization = old.quantization
        axis = quantization.quantizedDimension if quantization is not None else -1
        if quantization is not None and quantization.scale is not None and len(quantization.scale) > 1 and axis in keep:
            fresh = copy.copy(quantization)
            fresh.scale = np.asarray(quantization.scale, np.float32)[: keep[axis]]
            if quantization.zeroPoint is not None:
                fresh.zeroPoint = np.asarray(quantization.zeroPoint, np.int64)[: keep[axis]]
            fresh.min = fresh.max = None
            self.graph.tensors[new].quantization = fresh
        return new

    def _with_value(self, tensor: int, value: Array) -> int:
        """A new constant tensor like another one, with another value."""
        new, buffer = copy.copy(self.graph.tensors[tensor]), copy.copy(self.model.buffers[self.graph.tensors[tensor].buffer])
        buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        new.buffer, new.shape, new.shapeSignature = len(self.model.buffers), list(value.shape), None
        self.model.buffers.append(buffer)
        self.graph.tensors.append(new)
        return len(self.graph.tensors) - 1
