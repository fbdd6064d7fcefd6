"""An exported program quantized for XNNPACK with torchao's PT2E: static int8 activations, int8 weights per channel.

Ranges are kept by observer of the prepared graph: BatchNorm is folded there, and tensors that have to share a scale (the inputs
and the output of a concatenation) share an observer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

from ...calibration.ranges import Histogram, Range, count, least_weight_scale, samples
from ..base import Arrays, FloatArray
from .lowering import converting

CLAMPS = ("relu", "hardtanh", "clamp", "clamp_min")  # int8 saturates where they clip
LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
_STEPS = 127  # of an int8 weight, to each side of zero
_LEAST_SCALE = 1e-6  # of weights; by default 2**-12, of which a row with values up to 0.01 has 41 steps


def collect(program: ExportedProgram, inputs: Sequence[Arrays]) -> dict[str, Histogram]:
    """Histograms of the activations at each observer on the calibration inputs, by the observer's name.

    Raises:
        BuildError: an activation is NaN or infinite, there are no inputs, or the quantizer refused the graph.
    """
    recorder = _Recorder(_prepared(program))

    def run(blocks: Sequence[Arrays]) -> Iterator[list[FloatArray]]:
        for sample in samples(blocks):
            yield recorder.seen(tuple(torch.tensor(array) for array in sample))

    return count(recorder.names, run, inputs)


def quantize(
    program: ExportedProgram, ranges: Mapping[str, Range], sample: tuple[torch.Tensor, ...] | None = None
) -> ExportedProgram:
    """The program with int8 operators wherever XNNPACK supports them.

    Args:
        program: in float.
        ranges: by `collect`'s observers; the others have the range of their values on the sample.
        sample: inputs, batch 1; None: the zeros that the program was exported with.

    Raises:
        BuildError: the quantizer refused the graph.
    """
    prepared = _prepared(program, sample)
    for name, (low, high) in ranges.items():
        observer: Any = prepared.get_submodule(name)
        observer.min_val, observer.max_val = torch.tensor(low), torch.tensor(high)
    _widen_for_bias(prepared)
    with converting("the model cannot be quantized for XNNPACK"):
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        return torch.export.export(convert_pt2e(prepared), program.example_inputs[0], strict=False)


def float_layers(program: ExportedProgram) -> Counter[str]:
    """Convolutions and linear layers whose weights are not int8, by kind."""
    found = Counter[str]()
    for node in program.graph.nodes:
        kind = _operator_name(node)
        if kind in LAYERS and not _operator_name(node.args[1]).startswith("dequantize"):
            found[kind] += 1
    return found


def _prepared(program: ExportedProgram, sample: tuple[torch.Tensor, ...] | None = None) -> fx.GraphModule:
    """A copy with observers, which have seen the weights and one sample."""
    with converting("the model cannot be quantized for XNNPACK"):
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
        from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        usual = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
        # unlike the usual HistogramObserver, this one's range can be set
        spec = replace(usual.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
        weights = replace(usual.weight, observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=_LEAST_SCALE))
        config = replace(usual, input_activation=spec, output_activation=spec, weight=weights)
        quantizer = xnnpack.XNNPACKQuantizer().set_global(config)
        quantizer.set_filter_function(_quantizable)
        prepared: fx.GraphModule = prepare_pt2e(program.module(), quantizer)
        prepared(*(program.example_inputs[0] if sample is None else sample))
        return prepared


def _widen_for_bias(prepared: fx.GraphModule) -> None:
    """Widens the ranges of weights, in place, to where the steps of their layer's bias are large enough for int32."""
    for node in prepared.graph.nodes:
        if _operator_name(node) not in LAYERS or len(node.args) < 3 or getattr(node.args[2], "op", "") != "get_attr":
            continue
        if any(source.op != "call_module" for source in node.args[:2]):
            continue  # it stays in float
        observers: list[Any] = [prepared.get_submodule(str(source.target)) for source in node.args[:2]]
        given, weights = observers
        bias = attrgetter(str(node.args[2].target))(prepared).detach().numpy()
        if weights.max_val.shape != bias.shape:
            continue  # computed weights have one range
        least = _STEPS * least_weight_scale(bias, float(given.calculate_qparams()[0]))
        weights.max_val = torch.maximum(weights.max_val, torch.from_numpy(least).float())


def _quantizable(node: fx.Node) -> bool:
    """Whether XNNPACK's partitioner accepts a quantized node: no 3-D convolutions, no zero-dimensional operands."""
    values = (source.meta.get("val") for source in node.all_input_nodes)
    whole = all(value.ndim > 0 for value in values if isinstance(value, torch.Tensor))
    return whole and _operator_name(node) not in ("conv3d", "conv_transpose3d")


class _Recorder(fx.Interpreter):
    """Interpreter of a prepared graph that records the inputs of its activation observers.

    The input of a clamp is not recorded where the clamp's output shares its observer: int8 saturates at the same value.
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
            counted = [node for node in nodes if not all(_operator_name(user) in CLAMPS for user in node.users)] or nodes
            self._observer |= dict.fromkeys(counted, name)
        self._kept: dict[str, list[FloatArray]] = {}

    def seen(self, inputs: tuple[torch.Tensor, ...]) -> list[FloatArray]:
        """The values of one sample, in the order of `names`."""
        self._kept = {name: [] for name in self.names}
        with torch.no_grad():
            self.run(*inputs)
        return [np.concatenate(self._kept[name]) for name in self.names]

    def run_node(self, n: fx.Node) -> object:
        """Runs one node; the input of an observer is copied first, because in-place operators may overwrite it."""
        if n in self._observer:
            value = self.env[n.args[0]]  # type: ignore[index]
            self._kept[self._observer[n]].append(value.numpy().ravel().copy())
        return super().run_node(n)


def _operator_name(node: object) -> str:
    """ATen operator name without namespace, overload name and in-place underscore; empty if the node calls no operator."""
    target = getattr(node, "target", None)
    name = getattr(target, "__name__", "") if getattr(node, "op", "") == "call_function" else ""
    return name.partition(".")[0].rstrip("_")
