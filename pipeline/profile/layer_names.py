"""Which layer of the PyTorch network an operator of ONNX Runtime's profile is.

The runtime names what it ran after a node of the file, or after the tensor that it writes, with endings of its own
(`node_Conv_73_token_1`, `relu_nchwc`). The weights in the file keep the layers' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_LAYERS = ("Conv", "Gemm", "MatMul")
_ENDINGS = re.compile(r"(_nchwc|_token_\d+|_quant|_gemm|/MatMulAddFusion)+$")
_WEIGHT = re.compile(r"\.weight(_quantized)?$")


def names_of(path: Path, operators: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """A name for each operator (the runtime's name, its kind).

    A layer that a weight names gets that name; other operators are put together by kind, as `(Add)`; so are all of a file
    that is not ONNX.
    """
    layers = _layers(path) if path.suffix == ".onnx" else {}
    found = []
    for name, kind in operators:
        layer = layers.get(_ENDINGS.sub("", name)) if any(k in kind for k in _LAYERS) else None
        found.append(layer or (_ENDINGS.sub("", name) if any(k in kind for k in _LAYERS) else f"({kind})"))
    return tuple(found)


def _layers(path: Path) -> dict[str, str]:
    """Name of a node, or of a tensor that a layer's result goes straight into -> the layer."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    weights = {i.name for i in graph.initializer}
    source = {o: node for node in graph.node for o in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    names: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _LAYERS:
            held = next((w for i in node.input if (w := _weight(i, weights, source))), None)
            if held is not None:
                layer = _WEIGHT.sub("", held)
                names[node.name] = layer
                for tensor in _onwards(node.output[0], readers):
                    names.setdefault(tensor, layer)
    return names


def _weight(tensor: str, weights: set[str], source: dict[str, onnx.NodeProto]) -> str | None:
    """The initializer with a layer's weight behind an input, through DequantizeLinear."""
    while tensor in source and source[tensor].op_type in ("DequantizeLinear", "Transpose", "Cast"):
        tensor = source[tensor].input[0]
    return tensor if tensor in weights and _WEIGHT.search(tensor) else None


def _onwards(tensor: str, readers: dict[str, list[onnx.NodeProto]]) -> Iterator[str]:
    """A layer's result and what is computed from it alone until the next layer: what the runtime may have fused with it."""
    while True:
        yield tensor
        after = readers.get(tensor, [])
        if len(after) != 1 or after[0].op_type in (*_LAYERS, "QuantizeLinear"):
            return
        tensor = after[0].output[0]
