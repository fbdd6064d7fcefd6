"""Zeros that LiteRT's CPU runtime can skip: XNNPACK's sparse kernels, what they ask of a network, and weights stored for them.

XNNPACK computes sparsely only where a file says so (weights in sparse encoding behind DENSIFY operators) and only in a part of
the network that it can lay out channel by channel. Where one thing in that part does not fit, all of it is computed densely,
without a word; so the conditions are checked here, in the order the runtime meets them. They are those of XNNPACK's
`xnn_check_nchw_compatibility` and `xnn_subgraph_rewrite_for_nchw` (src/subgraph.c, 2026-11). One more is not visible in a file:
the processor. On x86 with AVX the runtime never does it, on Arm it does; so what it buys is measured, not assumed.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from .file import Array, add_buffer, compact, constant, graph_of, op_name, operator_code, read, write

HALF = 0.5  # of a layer's weights zero: from here on its sparse encoding is the smaller one
LEAST_ZEROS = 2 / 3  # of all weights of 1x1 convolutions and linear layers in the part
_ELEMENTWISE = frozenset(("ADD", "MUL", "RELU", "RELU6", "HARD_SWISH", "LOGISTIC", "TANH", "ABS", "NEG", "SQUARE", "ELU", "GELU"))
_BORDER = {3: 1, 5: 2}  # depthwise kernel -> rows of zeros on every side
_SAME = 0  # schema.Padding


def why_dense(data: bytes) -> str:
    """The first condition for sparse kernels that a file does not meet, with the operator; "" when it meets all of them."""
    return _Part(data).misfit()


def encode(data: bytes) -> bytes:
    """The same network with 1x1 convolutions' weights in sparse encoding (compressed rows) where at least half of them are zero.

    The classifier behind the mean is kept out of the sparse part, whose share of zeros it would count in: the mean keeps its
    axes, and a RESHAPE stands between them.
    """
    model = read(data)
    _classifier_apart(model)
    graph = graph_of(model)
    densified: list[Any] = []
    for op in graph.operators:
        value = _pointwise(model, op)
        if value is not None and (value == 0.0).mean() >= HALF:
            densified.append(_sparse(model, op, value))
    graph.operators = [*densified, *graph.operators]
    return write(compact(model))


def half_zero(data: bytes) -> bool:
    """Whether there is anything to encode: a 1x1 convolution half of whose weights are zero."""
    model = read(data)
    values = (_pointwise(model, op) for op in graph_of(model).operators)
    return any(value is not None and (value == 0.0).mean() >= HALF for value in values)


class _Part:
    """The operators from the first strided convolution to the spatial mean."""

    def __init__(self, data: bytes) -> None:
        self.model = read(data)
        self.graph = graph_of(self.model)
        self.producer = {int(out): op for op in self.graph.operators for out in op.outputs}

    def misfit(self) -> str:
        operators = list(self.graph.operators)
        start = next((n for n, op in enumerate(operators) if self._starts(op)), None)
        if start is None:
            return "no 3x3 convolution of stride 2 with three input channels and one row of zeros around it to begin with"
        zeros = weights = 0
        for number, op in enumerate(operators[start + 1 :], start + 2):
            kind = op_name(self.model, op)
            if kind == "MEAN" and self._spatial(op):
                break
            value = _pointwise(self.model, op)
            if value is not None:
                zeros, weights = zeros + int((value == 0.0).sum()), weights + value.size
            reason = self._misfit_of(op, f"{kind} {number}")
            if reason:
                return reason
        else:
            return "no mean over height and width to end with"
        if zeros <= LEAST_ZEROS * weights:
            share = 100 * zeros / max(weights, 1)
            return f"{share:.1f} % of the 1x1 convolutions' weights are zero, more than {100 * LEAST_ZEROS:.1f} % are needed"
        return ""

    def _misfit_of(self, op: Any, where: str) -> str:
        kind, options = op_name(self.model, op), op.builtinOptions
        if any(self.graph.tensors[i].type != 0 for i in (op.inputs[0], op.outputs[0])):
            return f"{where} is not computed in float"
        if kind == "PAD":
            users = [user for user in self.graph.operators if op.outputs[0] in user.inputs]
            if all(op_name(self.model, user) in ("CONV_2D", "DEPTHWISE_CONV_2D") for user in users):
                return ""  # becomes the border of the convolution, which is checked there
        elif kind == "CONV_2D":
            fits = _pointwise(self.model, op) is not None
            return "" if fits else f"{where} is a convolution that is not 1x1, or is strided, dilated or grouped"
        elif kind == "DEPTHWISE_CONV_2D":
            height, width = (int(n) for n in self.graph.tensors[op.inputs[1]].shape[1:3])
            fits = (
                height == width
                and self._border(op) == _BORDER.get(height)
                and options.strideH == options.strideW in (1, 2)
                and options.dilationHFactor == options.dilationWFactor == 1
                and options.depthMultiplier in (0, 1)
            )
            return "" if fits else f"{where} is not a depthwise 3x3 or 5x5 convolution of stride 1 or 2 with its zeros around it"
        elif kind in _ELEMENTWISE:
            flat = any(len(self.graph.tensors[i].shape) != 4 for i in op.inputs)
            return f"{where} has an input without height and width" if flat else ""
        return f"the operator {where} is not among those that can be laid out channel by channel"

    def _starts(self, op: Any) -> bool:
        if op_name(self.model, op) != "CONV_2D":
            return False
        shape = [int(n) for n in self.graph.tensors[op.inputs[1]].shape]
        options = op.builtinOptions
        plain = options.dilationHFactor == options.dilationWFactor == 1
        return shape[1:] == [3, 3, 3] and options.strideH == options.strideW == 2 and self._border(op) == 1 and plain

    def _border(self, op: Any) -> int:
        """Rows of zeros on every side of a convolution's input; -1 where the sides differ."""
        kernel = int(self.graph.tensors[op.inputs[1]].shape[1])
        if op.builtinOptions.padding == _SAME:  # with a stride, TensorFlow pads one side more than the other
            return (kernel - 1) // 2 if op.builtinOptions.strideH == 1 and kernel % 2 else -1
        before = self.producer.get(int(op.inputs[0]))
        if before is None or op_name(self.model, before) != "PAD":
            return 0
        sides = constant(self.model, self.graph.tensors[before.inputs[1]])
        if sides is None or sides[[0, 3]].any() or len(set(sides[1:3].ravel().tolist())) != 1:
            return -1
        return int(sides[1, 0])

    def _spatial(self, op: Any) -> bool:
        axes = constant(self.model, self.graph.tensors[op.inputs[1]])
        return axes is not None and sorted(int(a) % 4 for a in axes) == [1, 2]


def _pointwise(model: Any, op: Any) -> Array | None:
    """The weight of a 1x1 convolution without stride, dilation and groups; None for anything else."""
    graph = graph_of(model)
    if op_name(model, op) != "CONV_2D":
        return None
    value, options = constant(model, graph.tensors[op.inputs[1]]), op.builtinOptions
    once = (options.strideH, options.strideW, options.dilationHFactor, options.dilationWFactor) == (1, 1, 1, 1)
    channels = int(graph.tensors[op.inputs[0]].shape[-1])
    fits = value is not None and once and value.shape[1:3] == (1, 1) and value.shape[3] == channels
    return value if fits else None


def _sparse(model: Any, op: Any, value: Array) -> Any:
    """Store an operator's weight in compressed rows; returns the DENSIFY operator through which the runtime reads it."""
    from ai_edge_litert import schema_py_generated as schema

    graph = graph_of(model)
    rows = value.reshape(value.shape[0], -1)
    kinds = schema.DimensionType
    dimensions = [schema.DimensionMetadataT(kinds.DENSE, int(size)) for size in value.shape[:3]]
    segments, indices = _indices(np.append(0, np.cumsum((rows != 0).sum(1)))), _indices(np.nonzero(rows)[1])
    dimensions.append(schema.DimensionMetadataT(kinds.SPARSE_CSR, 0, *segments, *indices))

    old = graph.tensors[op.inputs[1]]
    stored, result = copy.copy(old), copy.copy(old)
    stored.sparsity = schema.SparsityParametersT(traversalOrder=[0, 1, 2, 3], dimMetadata=dimensions)
    stored.buffer, stored.name = add_buffer(model, rows[rows != 0]), f"s{len(graph.tensors)}".encode()
    result.buffer = 0
    graph.tensors += [stored, result]
    op.inputs = [op.inputs[0], len(graph.tensors) - 1, *op.inputs[2:]]
    return schema.OperatorT(
        operator_code(model, "DENSIFY"),
        inputs=[len(graph.tensors) - 2],
        outputs=[len(graph.tensors) - 1],
        builtinOptionsType=schema.BuiltinOptions.DensifyOptions,
        builtinOptions=schema.DensifyOptionsT(),
    )


def _indices(values: Array) -> tuple[int, Any]:
    """A vector of indices in the narrowest type that holds them, with the type's number."""
    from ai_edge_litert import schema_py_generated as schema

    kinds = (
        (np.uint8, schema.SparseIndexVector.Uint8Vector, schema.Uint8VectorT),
        (np.uint16, schema.SparseIndexVector.Uint16Vector, schema.Uint16VectorT),
        (np.int32, schema.SparseIndexVector.Int32Vector, schema.Int32VectorT),
    )
    dtype, number, cls = next(kind for kind in kinds if int(values.max(initial=0)) <= np.iinfo(kind[0]).max)
    return number, cls(values.astype(dtype))


def _classifier_apart(model: Any) -> None:
    """MEAN over height and width that keeps its axes, and a RESHAPE behind it."""
    from ai_edge_litert import schema_py_generated as schema

    graph = graph_of(model)
    for position, op in enumerate(list(graph.operators)):
        if op_name(model, op) != "MEAN" or op.builtinOptions.keepDims or len(graph.tensors[op.outputs[0]].shape) != 2:
            continue
        flat = graph.tensors[op.outputs[0]]
        whole, (batch, channels) = copy.copy(flat), map(int, flat.shape)
        whole.shape, whole.shapeSignature, whole.name = [batch, 1, 1, channels], None, f"m{position}".encode()
        sizes = add_buffer(model, np.array([batch, channels], "<i4"))
        shape = schema.TensorT([2], schema.TensorType.INT32, sizes, f"r{position}".encode())
        graph.tensors += [whole, shape]
        reshape = schema.OperatorT(
            operator_code(model, "RESHAPE"),
            inputs=[len(graph.tensors) - 2, len(graph.tensors) - 1],
            outputs=[int(op.outputs[0])],
            builtinOptionsType=schema.BuiltinOptions.ReshapeOptions,
            builtinOptions=schema.ReshapeOptionsT([batch, channels]),
        )
        op.builtinOptions = copy.copy(op.builtinOptions)
        op.builtinOptions.keepDims, op.outputs = True, [len(graph.tensors) - 2]
        graph.operators.insert(list(graph.operators).index(op) + 1, reshape)
