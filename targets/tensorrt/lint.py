"""Finds, without TensorRT, what TensorRT 10.3 (JetPack 6.2) to 11.x would refuse in an ONNX graph, or run slowly.

A pure function from a graph to findings. Each rule is one that TensorRT's own parser was seen to enforce (TensorRT-RTX 1.7) or
that decides whether int8 kernels are used; 2026-11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ..onnx.graph import DEQUANTIZE, LAYER_OPS, QUANTIZE, Graph, attribute, output_axis

OPSETS = range(17, 20)  # per-channel pairs need 13; TensorRT 10.3 knows up to 20, the oldest parsers we mean are sure of 19
_OPERATOR_FORM = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "QAttention")
_BIASED = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Finding:
    """Something TensorRT would not take, or not take as int8."""

    rule: str  # name in RULES
    node: str  # the node's name, or "graph"
    found: str

    def __str__(self) -> str:
        return f"{self.node}: {self.found} ({self.rule})"


def lint(model: onnx.ModelProto, *, two_four: Set[str] = frozenset()) -> tuple[Finding, ...]:
    """Findings in a float or QDQ graph, in the order of the rules and of the nodes; `two_four` names layers claimed to be 2:4."""
    graph = Graph(model)
    return tuple(Finding(rule, node, found) for rule, check in RULES.items() for node, found in check(graph, two_four))


def _opset(graph: Graph, _: Set[str]) -> Iterator[tuple[str, str]]:
    for entry in graph.model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version not in OPSETS:
            yield "graph", f"opset {entry.version}, not {OPSETS.start} to {OPSETS.stop - 1}"
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield _name(node), f"operator {node.op_type} of the domain {node.domain}"


def _operator_form(graph: Graph, _: Set[str]) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op_type.startswith("QLinear") or node.op_type in _OPERATOR_FORM:
            yield _name(node), f"{node.op_type}: a quantized operator, not one between Q/DQ pairs"


def _unsigned(graph: Graph, _: Set[str]) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op_type == QUANTIZE and len(node.input) < 3 and not attribute(node, "output_dtype", 0):
            yield _name(node), "no zero point, which makes its output uint8"
        for name in (*node.input, *node.output):
            if name in graph.constants and graph.constants[name].data_type == TensorProto.UINT8:
                yield _name(node), f"{name} is uint8"
        if node.op_type == "Cast" and attribute(node, "to", 0) == TensorProto.UINT8:
            yield _name(node), "casts to uint8"
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            yield "graph", f"{value.name} is uint8"


def _zero_point(graph: Graph, _: Set[str]) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op_type not in (QUANTIZE, DEQUANTIZE) or len(node.input) < 3:
            continue
        zero = graph.array(node.input[2])
        if zero is None:
            yield _name(node), "its zero point is computed"
        elif zero.any():
            yield _name(node), f"zero point {zero.ravel()[np.flatnonzero(zero)[0]]}"


def _scale(graph: Graph, _: Set[str]) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op_type not in (QUANTIZE, DEQUANTIZE):
            continue
        scale = graph.array(node.input[1])
        if scale is None:
            yield _name(node), "its scale is computed"
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            yield _name(node), f"scale {scale.ravel()[np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))[0]]}"


def _bias(graph: Graph, _: Set[str]) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op_type not in _BIASED or len(node.input) < 3 or not node.input[2]:
            continue
        bias = node.input[2]
        if bias in graph.producer and graph.producer[bias].op_type in (QUANTIZE, DEQUANTIZE):
            yield _name(node), f"its bias {graph.producer[bias].input[0]} is quantized"
        elif bias in graph.constants and graph.constants[bias].data_type == TensorProto.INT32:
            yield _name(node), f"its bias {bias} is int32"


def _per_channel(graph: Graph, _: Set[str]) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        constant, between = graph.weight(node) if node.op_type in LAYER_OPS else ("", [])
        if not constant or not between:
            continue
        dims = list(graph.constants[constant].dims)
        axis = output_axis(node)
        for pair in between:
            scale = graph.array(pair.input[1])
            if scale is not None and (scale.size != dims[axis] or scale.ndim != 1):
                yield _name(node), f"one scale for {dims[axis]} output channels of {constant}"
            elif scale is not None and attribute(pair, "axis", 1) % len(dims) != axis:
                yield _name(node), f"scales along axis {attribute(pair, 'axis', 1)} of {constant}, not {axis}"


def _pairs(graph: Graph, _: Set[str]) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op_type == QUANTIZE:
            users = graph.consumers[node.output[0]]
            if not users or any(user.op_type != DEQUANTIZE for user in users):
                yield _name(node), "what it gives is used without a DequantizeLinear"
        elif node.op_type == DEQUANTIZE and node.input[0] not in graph.constants:
            source = graph.producer.get(node.input[0])
            if source is None or source.op_type != QUANTIZE:
                yield _name(node), "what it takes comes from no QuantizeLinear"


def _two_four(graph: Graph, two_four: Set[str]) -> Iterator[tuple[str, str]]:
    layers = graph.layers()
    for name, node in layers:
        broken = _broken_fours(graph, node) if name in two_four else 0
        if broken:
            constant = graph.weight(node)[0]
            yield _name(node), f"{broken} groups of four inputs of {constant} have more than two that are not zero"
    for name in sorted(two_four - {name for name, _ in layers}):
        yield "graph", f"layer {name} is claimed to be 2:4 and is not there"


def two_four_layers(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the layers with at most two nonzero weights in every four consecutive inputs, those with groups left out."""
    graph = Graph(model)
    return frozenset(name for name, node in graph.layers() if attribute(node, "group", 1) == 1 and not _broken_fours(graph, node))


def _broken_fours(graph: Graph, node: onnx.NodeProto) -> int:
    values = graph.array(graph.weight(node)[0])
    assert values is not None  # `weight` returns the names of constants
    return fours_over_two(np.moveaxis(values, output_axis(node), 0))


def fours_over_two(weight: NDArray[Any]) -> int:
    """How many groups of four consecutive inputs of a weight (O, C, ...) hold more than two nonzero values.

    All of them, where inputs do not come in fours.
    """
    if weight.shape[1] % 4:
        return int(np.ceil(weight.size / 4))
    fours = weight.reshape(weight.shape[0], -1, 4, *weight.shape[2:])
    return int(((fours != 0).sum(axis=2) > 2).sum())


def _name(node: onnx.NodeProto) -> str:
    return node.name or (node.output[0] if node.output else node.op_type)


# name -> what it finds: (node, what is wrong)
RULES: dict[str, Callable[[Graph, Set[str]], Iterator[tuple[str, str]]]] = {
    "opset": _opset,
    "qoperator": _operator_form,
    "uint8": _unsigned,
    "zero-point": _zero_point,
    "scale": _scale,
    "bias": _bias,
    "per-channel": _per_channel,
    "pairs": _pairs,
    "2:4": _two_four,
}
