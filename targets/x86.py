"""ONNX Runtime on x86: one .onnx file, int8 (QDQ) or float, batch 1.

int8 is uint8 activations with int8 weights per channel. Range method and weight bit-width are chosen by what each choice costs on
the search split, in ONNX Runtime on this machine: without VNNI the int8 kernels sum pairs of products in 16 bits and 8-bit
weights saturate there, 7-bit weights do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipeline.types import Artifact, Pattern, Precision
from .base import BuildRequest, Infer, Interface, Limits, Runner, Target
from .onnx import missing_packages

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from .int8_choice import Int8Choice
    from .onnx.prober import OnnxProber


class X86(Target):
    """The target, see `targets.base.Target`."""

    name = "x86"
    runtime = "onnxruntime"
    limits = Limits(
        channel_multiple=8,
        precisions=(Precision.INT8, Precision.FP32),
        patterns=(Pattern.CHANNEL, Pattern.WEIGHT, Pattern.TWO_FOUR),  # the last two are stored zeros: they buy no time here
    )

    def missing(self) -> str | None:
        """Why artifacts cannot be built here; None when they can."""
        return missing_packages()

    def baseline(self, module: nn.Module, interface: Interface) -> bytes:
        """The float file of a dense network, see `targets.base.Target`."""
        self.require()
        from .onnx.export import export_float

        return _labelled(export_float(module, interface.image_shape), interface.classes)

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.onnx` and `baseline.onnx` into the request's folder.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be exported, quantized or run.
        """
        self.require(request.precision)
        from .onnx.export import export_float

        network = export_float(request.module, request.image_shape)
        notes: tuple[str, ...] = ()
        options: dict[str, str] = {}
        choices: tuple[str, ...] = ()
        if request.precision is Precision.INT8:
            chosen = _int8(network, request)
            network, notes, options, choices = chosen.network, chosen.notes, chosen.options, chosen.choices
        return self.artifact(
            request,
            _labelled(network, request.classes),
            "onnx",
            network.graph.input[0].name,
            notes=(*notes, "input: float32 pixels, already scaled and normalised; output: logits"),
            options=options,
            choices=choices,
        )

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The artifact in ONNX Runtime on the CPU; takes any number of inputs.

        Raises:
            UnavailableError: onnxruntime is missing.
            BuildError: the file cannot be loaded.
        """
        from .onnx.run import predictor, require_runtime

        require_runtime()
        yield predictor(str(path), threads)

    def runner_through(self, path: Path, infer: Infer) -> AbstractContextManager[Runner]:
        """The artifact on another machine, see `targets.base.Elsewhere`."""
        from .onnx.run import runner_through

        return runner_through(path, infer)

    def prober(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> OnnxProber:
        """Latency models of candidates, see `targets.base.Prober`.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be exported or quantized.
        """
        self.require()
        from .onnx.prober import OnnxProber

        return OnnxProber(module, image_shape, precision)


def _int8(network: onnx.ModelProto, request: BuildRequest) -> Int8Choice[onnx.ModelProto]:
    """The int8 network that costs least on the search split, with what this processor does to 8-bit weights."""
    from .int8_choice import Int8Format, choose_int8
    from .onnx.export import export_float
    from .onnx.int8 import ends, has_vnni, histograms, quantize
    from .onnx.run import predictor

    how = Int8Format(
        activation_type="uint8",
        export=lambda module: export_float(module, request.image_shape),
        collect=lambda model: histograms(model, request),
        quantize=quantize,
        load=lambda model: predictor(model.SerializeToString(), request.threads),
        weight_bits=(8, 7),
        ends=ends(network),
    )
    chosen = choose_int8(network, request, how)
    kernels = (
        "has VNNI: 8-bit weights are exact" if has_vnni() else "has no VNNI: 8-bit weights can saturate, 7-bit weights cannot"
    )
    return replace(chosen, notes=(chosen.notes[0], f"this processor {kernels}", *chosen.notes[1:]))


def _labelled(model: onnx.ModelProto, classes: tuple[str, ...]) -> bytes:
    """The file, with what its reader needs and the graph does not say."""
    from .onnx.export import described

    return described(
        model, {"classes": json.dumps(classes), "input": "float32 pixels, already scaled and normalised", "output": "logits"}
    )


TARGET = X86()
