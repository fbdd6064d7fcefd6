"""The dense .tflite network, float or int8, cut to a candidate's structure without converting anything again.

Works on the objects of `tflite/file.py`; the algorithm is `cutting.py`. Weights, biases and their per-channel scales are sliced.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...pipeline.errors import BuildError
from ..base import Structure
from .cutting import Editor, Rule, Shape
from .file import Array, add_buffer, compact, constant, graph_of, op_name, operator_code
from .layers import LAYER_OPS, layer_ops

_BROADCAST = (
    *("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "ABS", "NEG", "EXP", "SQRT", "RSQRT", "SQUARE", "CAST", "PRELU"),
    *("RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "LEAKY_RELU", "ELU", "GELU", "HARD_SWISH", "LOGISTIC", "TANH"),
    *("QUANTIZE", "DEQUANTIZE"),
)
_KEEP = ("MAX_POOL_2D", "AVERAGE_POOL_2D", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "PAD", "PADV2", "MIRROR_PAD")
_RULES = {
    **dict.fromkeys(LAYER_OPS, Rule.LAYER),
    **dict.fromkeys(_BROADCAST, Rule.BROADCAST),
    **dict.fromkeys(_KEEP, Rule.KEEP),
    **dict.fromkeys(("MEAN", "SUM", "REDUCE_MAX"), Rule.REDUCE),
    "CONCATENATION": Rule.CONCAT,
    "TRANSPOSE": Rule.TRANSPOSE,
    "RESHAPE": Rule.RESHAPE,
}
_SAME_SCALE = frozenset(("MAX_POOL_2D", "AVERAGE_POOL_2D", "PAD", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"))
_NOT_NEGATIVE = frozenset(("RELU", "RELU6", "RELU_0_TO_1", "LOGISTIC"))
RELUS = {1: "RELU", 3: "RELU6"}  # ActivationFunctionType -> the operator that does the same


def cut(model: Any, names: Sequence[str], structure: Structure) -> Any:
    """A network of this structure, cut from a dense one, float or int8, that is not changed; see `cutting.Editor.cut`.

    `names` are those of its layer operators, see `layers.layer_names`.
    """
    editor = TfliteEditor(model, names)
    editor.cut(structure)
    return editor.build()


class TfliteEditor(Editor[Any, int]):
    """Copies of a network's operators and tensors; constants are shared with the original until one is cut."""

    place, rules, unlisted = "the converted network", _RULES, Rule.UNKNOWN

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.model = copy.copy(model)
        self.model.buffers = list(model.buffers)
        self.model.operatorCodes = list(model.operatorCodes)
        self.graph = copy.copy(graph_of(model))
        self.graph.tensors = [copy.copy(tensor) for tensor in self.graph.tensors]
        self.ops = self.graph.operators = [copy.copy(op) for op in self.graph.operators]
        for op in self.ops:
            op.inputs, op.outputs = list(map(int, op.inputs)), list(map(int, op.outputs))
        self.model.subgraphs = [self.graph]
        self.layers = {name: op for name, op in zip(names, layer_ops(self.model), strict=True) if name}
        self.producer = {out: op for op in self.ops for out in op.outputs}
        self.outputs = list(map(int, self.graph.outputs))
        self.now = {}

    def build(self) -> Any:
        """The edited network."""
        self.graph.operators = self.ops
        for tensor, shape in self.now.items():
            self.graph.tensors[tensor].shape, self.graph.tensors[tensor].shapeSignature = list(shape), None
        return compact(self.model)

    def kind(self, op: Any) -> str:
        """See `Editor`."""
        return op_name(self.model, op)

    def inputs(self, op: Any) -> Sequence[int]:
        """See `Editor`."""
        return [i for i in op.inputs if i >= 0]

    def results(self, op: Any) -> Sequence[int]:
        """See `Editor`."""
        return list(op.outputs)

    def was(self, tensor: int) -> Shape:
        """See `Editor`."""
        shape = self.graph.tensors[tensor].shape
        return () if shape is None else tuple(int(n) for n in shape)

    def value(self, tensor: int) -> Array | None:
        """See `Editor`."""
        return constant(self.model, self.graph.tensors[tensor])

    def axis(self, op: Any) -> int:
        """See `Editor`."""
        return int(op.builtinOptions.axis)

    def order(self, op: Any) -> Sequence[int] | None:
        """See `Editor`."""
        order = self.value(op.inputs[1])
        return None if order is None else [int(n) for n in order]

    def write_shape(self, op: Any, shape: Shape) -> None:
        """See `Editor`."""
        if len(op.inputs) > 1 and self.value(op.inputs[1]) is not None:
            op.inputs[1] = self._with_value(op.inputs[1], np.array(shape, np.int32))
        if op.builtinOptions is not None:
            op.builtinOptions = copy.copy(op.builtinOptions)
            op.builtinOptions.newShape = list(shape)

    def width(self, op: Any) -> tuple[int, int, int]:
        """See `Editor`."""
        shape = self.was(op.inputs[1])
        return (1, shape[3], -1) if self.kind(op) == "DEPTHWISE_CONV_2D" else (shape[-1], shape[0], -1)

    def narrow(self, op: Any, inputs: int, outputs: int) -> None:
        """See `Editor`."""
        shape = self.was(op.inputs[1])
        if self.kind(op) == "DEPTHWISE_CONV_2D":
            keep = {3: outputs}
            op.builtinOptions = copy.copy(op.builtinOptions)
            op.builtinOptions.depthMultiplier = outputs // inputs
        else:
            keep = {0: outputs, len(shape) - 1: inputs * shape[-1] // self.was(op.inputs[0])[-1]}
        self.shorten(op, op.inputs[1], keep)
        if len(op.inputs) > 2 and op.inputs[2] >= 0:
            self.shorten(op, op.inputs[2], {0: outputs})

    def shorten(self, op: Any, operand: int, sizes: Mapping[int, int]) -> None:
        """See `Editor`; scales that run along a shortened axis are cut too."""
        op.inputs = [self._sliced(i, sizes) if i == operand else i for i in op.inputs]

    def bypass(self, name: str, branch: int, add: Any) -> None:
        """See `Editor`."""
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
        for op in self.ops:
            op.inputs = [shortcut if i == add.outputs[0] else i for i in op.inputs]
        self.ops.remove(add)

    def _become(self, op: Any, kind: str, inputs: list[int]) -> None:
        """Make an operator another one, without options."""
        op.opcodeIndex, op.inputs = operator_code(self.model, kind, version=2), inputs
        op.builtinOptionsType, op.builtinOptions = 0, None  # schema.BuiltinOptions.NONE

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
        new = copy.copy(self.graph.tensors[tensor])
        new.buffer, new.shape, new.shapeSignature = add_buffer(self.model, value), list(value.shape), None
        self.graph.tensors.append(new)
        return len(self.graph.tensors) - 1
