"""TensorRT on NVIDIA Jetson: an ONNX file, int8, half or float, that TensorRT 10.3 (JetPack 6.2) to 11.x builds engines from.

An engine belongs to one GPU and one TensorRT, so it is built on the board; what is built here is the file it is built from. It is
checked by our own linter always, by NVIDIA's parser where that is installed, and its answers are computed in ONNX Runtime with
every Q/DQ pair where it stands: the arithmetic TensorRT is asked for, not TensorRT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..pipeline.errors import BuildError, UnavailableError
from ..pipeline.types import SPARSITY_KEY, Artifact, Kind, Pattern, Precision
from .base import BuildRequest, Interface, Limits, Runner, Target
from .onnx import missing_packages

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from .int8_choice import Int8Choice
    from .tensorrt.prober import JetsonProber


class Jetson(Target):
    """The target, see `targets.base.Target`."""

    name = "jetson"
    runtime = "tensorrt"
    simulation = Kind.ESTIMATED  # what `runner` answers: the graph's arithmetic, in another runtime
    needs_device = True  # the engine is built on a board, or on a GPU of this machine
    # int8 tensor cores want input channels in sixteens (mma m16n8k32 and m8n8k16): what is left over is padded
    limits = Limits(
        channel_multiple=16,
        precisions=(Precision.INT8, Precision.FP16, Precision.FP32),
        patterns=(Pattern.CHANNEL, Pattern.TWO_FOUR),
    )

    def missing(self) -> str | None:
        """Why the file cannot be built here; None when it can. A board is not needed for it."""
        return missing_packages()

    def baseline(self, module: nn.Module, interface: Interface) -> bytes:
        """The float file of a dense network, see `targets.base.Target`."""
        self.require()
        from .onnx.export import export_float

        return _accepted(export_float(module, interface.image_shape), interface.classes, frozenset())

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.onnx` and `baseline.onnx`, what engines are built from, into the request's folder.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be exported or quantized, or TensorRT would refuse it; the message names the node.
        """
        self.require(request.precision)
        from .onnx.export import export_float
        from .onnx.int8 import halve

        network = export_float(request.module, request.image_shape)
        sparse = two_four_layers(network) if request.pattern is Pattern.TWO_FOUR else frozenset()
        notes: tuple[str, ...] = ()
        options: dict[str, str] = {}
        choices: tuple[str, ...] = ()
        if request.precision is Precision.INT8:
            chosen = _int8(network, request)
            network, notes, options, choices = chosen.network, chosen.notes, chosen.options, chosen.choices
        elif request.precision is Precision.FP16:
            network = halve(network)
        data = _accepted(network, request.classes, sparse)
        options |= {"opset": str(network.opset_import[0].version), "linter": "nothing found"}
        if sparse:
            options["two_four_layers"] = str(len(sparse))
        parser = _parsed(data, two_four=bool(sparse))
        return self.artifact(
            request,
            data,
            "onnx",
            network.graph.input[0].name,
            notes=(*notes, parser, "input: float32 NCHW, already scaled and normalised; output: logits"),
            options=options,
            choices=choices,
        )

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The file's arithmetic in ONNX Runtime on the CPU, pair by pair; takes any number of inputs. This is not TensorRT.

        Raises:
            UnavailableError: onnxruntime is missing.
            BuildError: the file cannot be loaded; an engine runs on its board only.
        """
        from .onnx.run import require_runtime, simulate

        require_runtime()
        if Path(path).suffix == ".engine":
            raise BuildError(f"{Path(path).name} cannot be run here", found="an engine", expected="the board it was built on")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BuildError(f"{Path(path).name} cannot be read", found=error.strerror or str(error)) from error
        yield simulate(data, threads)

    def prober(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> JetsonProber:
        """Files of candidates for a board, and estimates for when there is none, see `targets.base.Prober` and `Estimator`.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be exported.
        """
        self.require()
        from .tensorrt.prober import JetsonProber

        return JetsonProber(module, image_shape, precision)


def two_four_layers(model: onnx.ModelProto) -> frozenset[str]:
    """Layers of a float network with at most two nonzero weights in every four consecutive inputs, by module name."""
    from onnx import numpy_helper

    from .onnx.edit import layers
    from .onnx.graph import output_axis
    from .tensorrt.lint import fours_over_two

    weights = {i.name: i for i in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    found = set()
    for name, layer in layers(model).items():
        values = np.moveaxis(numpy_helper.to_array(weights[f"{name}.weight"]), output_axis(nodes[layer.node]), 0)
        if layer.groups == 1 and not fours_over_two(values):
            found.add(name)
    return frozenset(found)


def _int8(network: onnx.ModelProto, request: BuildRequest) -> Int8Choice[onnx.ModelProto]:
    """The QDQ network that costs least on the search split."""
    from .int8_choice import Int8Format, choose_int8
    from .onnx.export import export_float
    from .onnx.int8 import ends, histograms
    from .onnx.run import simulate
    from .tensorrt.qdq import quantize

    how = Int8Format(
        activation_type="int8",
        export=lambda module: export_float(module, request.image_shape),
        collect=lambda model: histograms(model, request),
        quantize=quantize,
        load=lambda model: simulate(model.SerializeToString(), request.threads),
        ends=ends(network),
    )
    return choose_int8(network, request, how)


def _accepted(model: onnx.ModelProto, classes: tuple[str, ...], two_four: frozenset[str]) -> bytes:
    """The file, with what its reader needs and the graph does not say.

    Raises:
        BuildError: TensorRT would refuse it.
    """
    from .onnx.export import described
    from .tensorrt.lint import lint

    notes = {
        "classes": json.dumps(classes),
        "input": "float32 NCHW, already scaled and normalised",
        "output": "logits",
        SPARSITY_KEY: "enable" if two_four else "disable",
    }
    data = described(model, notes)
    findings = lint(model, two_four=two_four)
    if findings:
        more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise BuildError("TensorRT would refuse the network", found=f"{findings[0]}{more}", do="replace this operation")
    return data


def _parsed(data: bytes, *, two_four: bool) -> str:
    """What NVIDIA's parser says, as a note.

    Raises:
        BuildError: it refused the file; so would a Jetson's.
    """
    from .tensorrt import parser_check as tensorrt_check

    reason = tensorrt_check.missing()
    if reason:
        return f"not seen by NVIDIA's parser: {reason}"
    try:
        verdict = tensorrt_check.check(data, two_four=two_four)
    except UnavailableError as error:
        return f"not seen by NVIDIA's parser: {error}"
    if not verdict.accepted:
        raise BuildError("NVIDIA's parser refuses the network", found=str(verdict), do="replace this operation")
    return str(verdict)


TARGET = Jetson()
