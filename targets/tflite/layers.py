"""Which operator of a .tflite network is which layer of the module, found by its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...pipeline.errors import BuildError
from .file import Array, constant, graph_of, op_name

LAYER_OPS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def layer_names(model: Any, weights: Mapping[str, Array]) -> tuple[str, ...]:
    """The module name of each layer operator, in the order they run; "" for one that is none of them.

    The model is float, its BatchNorm folded. Weights are by module name, as torch keeps them, (O, I, kh, kw) or (O, I); no two
    may be equal.

    Raises:
        BuildError: a layer has not exactly one operator.
    """
    graph = graph_of(model)
    wanted = {_key(stored): name for name, weight in weights.items() for stored in _as_stored(weight)}
    names = []
    for op in layer_ops(model):
        stored = constant(model, graph.tensors[op.inputs[1]])
        names.append("" if stored is None else wanted.get(_key(stored), ""))
    for name in weights:
        if names.count(name) != 1:
            what, found = f"layer {name} in the converted network", f"{names.count(name)} operators with its weights"
            raise BuildError(what, found=found, expected="one", do="report the network's forward")
    return tuple(names)


def layer_ops(model: Any) -> list[Any]:
    """The layer operators, in the order they run."""
    return [op for op in graph_of(model).operators if op_name(model, op) in LAYER_OPS]


def _as_stored(weight: Array) -> list[Array]:
    """A weight as the format keeps it: (O, kh, kw, I), depthwise (1, kh, kw, O), linear (O, I)."""
    if weight.ndim != 4:
        return [weight]
    return [weight.transpose(0, 2, 3, 1), *([weight.transpose(1, 2, 3, 0)] if weight.shape[1] == 1 else [])]


def _key(value: Array) -> tuple[tuple[int, ...], bytes]:
    return value.shape, np.ascontiguousarray(value, dtype=np.float32).tobytes()
