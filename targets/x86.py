"""ONNX Runtime on x86: one .onnx file, int8 (QDQ) or float, batch 1.

int8 is uint8 activations with int8 weights per channel. Range method and weight bit-width are chosen by what each choice costs on
the search split, in ONNX Runtime on this machine: without VNNI the int8 kernels sum pairs of products in 16 bits and 8-bit
weights saturate there, 7-bit weights do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipeline.options import Pattern, Precision
from ..pipeline.signature import Signature
from ..pipeline.types import Artifact
from .base import BuildRequest, Converted, Infer, Limits, Runner
from .onnx.target import OnnxTarget, best_int8, facts_of, sides_of, taken

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from .onnx.prober import OnnxProber


class X86(OnnxTarget):
    """The target, see `targets.base.Target`."""

    name = "x86"
    runtime = "onnxruntime"
    int8_may_be_slower = True  # without VNNI
    limits = Limits(
        channel_multiple=8,
        precisions=(Precision.INT8, Precision.FP32),
        patterns=(Pattern.CHANNEL, Pattern.WEIGHT, Pattern.TWO_FOUR),  # the last two are stored zeros: they buy no time here
    )

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.onnx` and `baseline.onnx` into the request's folder; see `Target.build`."""
        self.require(request.precision)
        from .onnx.export import export_float

        converted = Converted(export_float(request.module, request.signature))
        if request.precision is Precision.INT8:
            converted = _int8(converted.network, request)
        data = self.file_of(converted.network, request.classes)
        sides = sides_of(converted.network, request.mean, request.std)
        note = taken(request.signature, request.classes)
        return self.artifact(request, converted, data, "onnx", sides, note)

    def file_of(self, model: onnx.ModelProto, classes: tuple[str, ...]) -> bytes:
        """The model's file with the metadata its reader needs."""
        from .onnx.export import described

        return described(model, facts_of(model, classes))

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The artifact in ONNX Runtime on the CPU; see `Target.runner`."""
        from .onnx.run import predictor, require_runtime

        require_runtime()
        yield predictor(str(path), threads)

    @contextmanager
    def runner_through(self, path: Path, infer: Infer) -> Iterator[Runner]:
        """The artifact on another machine, see `targets.base.Elsewhere`."""
        import onnx

        from .onnx.run import one_by_one

        graph = onnx.load(path).graph
        outputs = [value.name for value in graph.output]
        yield one_by_one(graph.input, lambda given: [infer(given)[name] for name in outputs])

    def prober(self, module: nn.Module, signature: Signature, precision: Precision) -> OnnxProber:
        """Latency models of candidates; see `Target.prober`."""
        self.require()
        from .onnx.prober import OnnxProber

        return OnnxProber(module, signature, precision)


def _int8(network: onnx.ModelProto, request: BuildRequest) -> Converted[onnx.ModelProto]:
    """The int8 network that costs least on the search split, with what this processor does to 8-bit weights."""
    from .onnx.graph import Graph
    from .onnx.int8 import between_token_layers, has_vnni, quantize
    from .onnx.run import predictor

    best = best_int8(network, request, quantize, predictor, activation_type="uint8", weight_bits=(8, 7))
    effect = "VNNI: 8-bit weights are exact" if has_vnni() else "no VNNI: 8-bit weights can saturate, 7-bit weights cannot"
    tokens = ("operators between linear layers on tokens stay in float",) if between_token_layers(Graph(network)) else ()
    return replace(best, notes=(best.notes[0], f"this processor has {effect}", *tokens, *best.notes[1:]))


TARGET = X86()
