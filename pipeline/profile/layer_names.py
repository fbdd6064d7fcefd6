"""Which layer of the PyTorch network an operator of ONNX Runtime's profile is.

The runtime names what it ran after a node of the file, or after the tensor that it writes, with endings of its own
(`node_Conv_73_token_1`, `relu_nchwc`). The weights in the file keep the layers' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...devices.measure.usage import LayerTime

if TYPE_CHECKING:
    from ...targets.onnx.graph import Graph

_LAYERS = ("Conv", "Gemm", "MatMul")
_ENDINGS = re.compile(r"(_nchwc|_token_\d+|_quant|_gemm|/MatMulAddFusion)+$")


def names_of(path: Path, operators: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """A name for each operator (the runtime's name, its kind).

    A layer that a weight names gets that name; other operators are put together by kind, as `(Add)`; so are all of a file
    that is not ONNX.
    """
    layers = _layers(path) if path.suffix == ".onnx" else {}
    found = []
    for name, kind in operators:
        plain = _ENDINGS.sub("", name)
        found.append(layers.get(plain, plain) if any(layer in kind for layer in _LAYERS) else f"({kind})")
    return tuple(found)


def merged(path: Path, layers: Sequence[LayerTime]) -> tuple[LayerTime, ...]:
    """Returns times by layer of the PyTorch network, where the file tells it: operators of one layer are added."""
    found: dict[str, LayerTime] = {}
    for name, layer in zip(names_of(path, [(layer.name, layer.kind) for layer in layers]), layers, strict=True):
        before = found[name].ms if name in found else 0.0
        found[name] = LayerTime(name, layer.kind, before + layer.ms)
    return tuple(found.values())


def _layers(path: Path) -> dict[str, str]:
    """Name of a node, or of a tensor that a layer's result goes straight into -> the layer."""
    import onnx

    from ...targets.onnx.graph import Graph

    graph = Graph(onnx.load(path, load_external_data=False))
    names: dict[str, str] = {}
    for layer, node in graph.layers():
        names[node.name] = layer
        for tensor in _onwards(node.output[0], graph):
            names.setdefault(tensor, layer)
    return names


def _onwards(tensor: str, graph: Graph) -> Iterator[str]:
    """A layer's result and what is computed from it alone until the next layer: what the runtime may have fused with it."""
    while True:
        yield tensor
        after = graph.consumers[tensor]
        if len(after) != 1 or after[0].op_type in (*_LAYERS, "QuantizeLinear"):
            return
        tensor = after[0].output[0]
