"""An exported graph quantized for XNNPACK by torchao's PT2E flow: int8 activations and weights (per channel), static ranges.

Ranges are kept by observer, in the prepared graph: there BatchNorm is folded, and tensors that have to share a scale (the inputs
and the output of a concatenation) share an observer.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ...calibration.ranges import Histogram, Range, count
from ...pipeline.errors import BuildError, deepest_cause
from ..base import Arrays, FloatArray
from ..quiet import quiet
from .lowering import Example

CLAMPS = ("relu", "hardtanh", "clamp", "clamp_min")  # what they cut off needs no steps
LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


def collect(network: fx.GraphModule, example: Example, inputs: Sequence[Arrays]) -> dict[str, Histogram]:
    """Counts of the values that each observer of activations sees on some inputs, by the observer's name.

    Raises:
        BuildError: an activation is NaN or infinite, there are no inputs, or the quantizer refused the graph.
    """
    recorder = _Recorder(_prepared(network, example))

    def run(blocks: Sequence[Arrays]) -> Iterator[list[FloatArray]]:
        for block in blocks:
            each = block if isinstance(block, tuple) else (block,)
            for at in range(len(each[0])):
                yield recorder.seen(tuple(torch.tensor(a[at : at + 1]) for a in each))

    return count(recorder.names, run, inputs)


def quantize(network: fx.GraphModule, example: Example, ranges: Mapping[str, Range]) -> fx.GraphModule:
    """A copy of the graph with int8 operators wherever XNNPACK has them; ranges are those of `collect`'s observers.

    Raises:
        BuildError: the quantizer refused the graph.
    """
    prepared = _prepared(network, example)
    for name, (low, high) in ranges.items():
        observer: Any = prepared.get_submodule(name)
        observer.min_val, observer.max_val = torch.tensor(low), torch.tensor(high)
    try:
        with quiet(), torch.no_grad():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

            converted: fx.GraphModule = convert_pt2e(prepared)
            return converted
    except Exception as error:  # of many types, all of them about the user's module
        raise BuildError("the model cannot be quantized for XNNPACK", found=deepest_cause(error)) from error


def float_layers(network: fx.GraphModule) -> Counter[str]:
    """Convolutions and linear layers whose weights are not int8, by kind."""
    found = Counter[str]()
    for node in network.graph.nodes:
        kind = _kind(node)
        if kind in LAYERS and not _kind(node.args[1]).startswith("dequantize"):
            found[kind] += 1
    return found


def _prepared(network: fx.GraphModule, example: Example) -> fx.GraphModule:
    """A copy with observers, those of the weights filled."""
    try:
        with quiet(), torch.no_grad():
            from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
            from torchao.quantization.pt2e import MinMaxObserver
            from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

            usual = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
            # the extremes that this one has seen can be set
            spec = replace(usual.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
            quantizer = xnnpack.XNNPACKQuantizer().set_global(replace(usual, input_activation=spec, output_activation=spec))
            quantizer.set_filter_function(_quantizable)
            prepared: fx.GraphModule = prepare_pt2e(copy.deepcopy(network), quantizer)
            prepared(*example)
            return prepared
    except Exception as error:  # of many types, all of them about the user's module
        raise BuildError("the model cannot be quantized for XNNPACK", found=deepest_cause(error)) from error


def _quantizable(node: fx.Node) -> bool:
    """Whether XNNPACK's converter takes a node in int8: no kernels in three dimensions, no operands without dimensions."""
    values = (source.meta.get("val") for source in node.all_input_nodes)
    whole = all(value.ndim > 0 for value in values if isinstance(value, torch.Tensor))
    return whole and _kind(node) not in ("conv3d", "conv_transpose3d")


class _Recorder(fx.Interpreter):
    """Runs a prepared graph and keeps what its observers of activations see.

    What only a clamp reads is not counted where the observer sees the clamp's output too: int8 saturates at the same value.
    """

    def __init__(self, prepared: fx.GraphModule) -> None:
        super().__init__(prepared)
        from torchao.quantization.pt2e import MinMaxObserver

        first: dict[int, str] = {}  # an observer may have several names
        places: dict[str, list[fx.Node]] = {}
        for node in prepared.graph.nodes:
            observer = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(observer, MinMaxObserver):
                places.setdefault(first.setdefault(id(observer), str(node.target)), []).append(node)
        self.names = list(places)
        self._observer: dict[fx.Node, str] = {}
        for name, nodes in places.items():
            counted = [node for node in nodes if not all(_kind(user) in CLAMPS for user in node.users)] or nodes
            self._observer |= dict.fromkeys(counted, name)
        self._kept: dict[str, list[FloatArray]] = {}

    def seen(self, inputs: Example) -> list[FloatArray]:
        """The values of one sample, in the order of `names`."""
        self._kept = {name: [] for name in self.names}
        with torch.no_grad():
            self.run(*inputs)
        return [np.concatenate(self._kept[name]) for name in self.names]

    def run_node(self, n: fx.Node) -> object:
        """Runs one node; of an observer, its input is kept as it is now: operators in place may change it."""
        if n in self._observer:
            value = self.env[n.args[0]]  # type: ignore[index]
            self._kept[self._observer[n]].append(value.numpy().ravel().copy())
        return super().run_node(n)


def _kind(node: object) -> str:
    """The operator's name without namespace, overload and the mark of operators in place; "" of what is no operator."""
    target = getattr(node, "target", None)
    name = getattr(target, "__name__", "") if getattr(node, "op", "") == "call_function" else ""
    return name.partition(".")[0].rstrip("_")
