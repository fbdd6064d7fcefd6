"""TensorRT on NVIDIA Jetson: an ONNX file, int8, half or float, that TensorRT 10.3 (JetPack 6.2) to 11.x builds engines from.

An engine belongs to one GPU and one TensorRT, so it is built on the board; what is built here is the file it is built from. It is
checked by our own linter always, by NVIDIA's parser where that is installed, and its answers are computed in ONNX Runtime with
every Q/DQ pair where it stands: the arithmetic TensorRT is asked for, not TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipeline.errors import BuildError, UnavailableError
from ..pipeline.options import SPARSITY_KEY, Pattern, Precision
from ..pipeline.signature import Signature
from ..pipeline.types import Artifact
from .base import BuildRequest, Converted, Limits, Runner, artifact_bytes
from .onnx.target import OnnxTarget, best_int8, facts_of, sides_of, taken

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from .tensorrt.prober import JetsonProber


class Jetson(OnnxTarget):
    """The target, see `targets.base.Target`."""

    name = "jetson"
    runtime = "tensorrt"
    needs_device = True  # the engine is built on a board, or on a GPU of this machine
    # int8 tensor cores want input channels in sixteens (mma m16n8k32 and m8n8k16): what is left over is padded
    limits = Limits(
        channel_multiple=16,
        precisions=(Precision.INT8, Precision.FP16, Precision.FP32),
        patterns=(Pattern.CHANNEL, Pattern.TWO_FOUR),
    )

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.onnx` and `baseline.onnx`, what engines are built from, into the request's folder; see `Target.build`."""
        self.require(request.precision)
        from .onnx.export import export_float
        from .onnx.int8 import halve
        from .onnx.run import simulate
        from .tensorrt.lint import two_four_layers
        from .tensorrt.qdq import left_in_float, quantize

        network = export_float(request.module, request.signature)
        sparse = two_four_layers(network) if request.pattern is Pattern.TWO_FOUR else frozenset()
        if request.precision is Precision.INT8:
            converted = best_int8(network, request, quantize, simulate, activation_type="int8")
        else:
            converted = Converted(halve(network) if request.precision is Precision.FP16 else network)
        model = converted.network
        data = self.file_of(model, request.classes, sparse)
        options = {"opset": str(model.opset_import[0].version), "linter": "nothing found"}
        if sparse:
            options["two_four_layers"] = str(len(sparse))
        notes = [_parsed(data, two_four=bool(sparse)), taken(request.signature, request.classes)]
        if request.precision is Precision.INT8 and (note := left_in_float(model)):
            notes.insert(0, note)
        sides = sides_of(model, request.mean, request.std)
        return self.artifact(request, converted, data, "onnx", sides, *notes, **options)

    def file_of(self, model: onnx.ModelProto, classes: tuple[str, ...], two_four: frozenset[str] = frozenset()) -> bytes:
        """The model's file with the metadata its reader needs.

        Raises:
            BuildError: TensorRT would refuse it, or a layer named in `two_four` is not 2:4 sparse.
        """
        from .onnx.export import described
        from .tensorrt.lint import lint

        sparsity = {SPARSITY_KEY: "enable" if two_four else "disable"}
        data = described(model, {**facts_of(model, classes), **sparsity})
        findings = lint(model, two_four=two_four)
        if findings:
            more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
            raise BuildError("TensorRT would refuse the network", found=f"{findings[0]}{more}", do="replace this operation")
        return data

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The file's arithmetic in ONNX Runtime on the CPU, pair by pair, which is not TensorRT; see `Target.runner`."""
        from .onnx.run import require_runtime, simulate

        require_runtime()
        if Path(path).suffix == ".engine":
            raise BuildError(f"{Path(path).name} cannot be run here", found="an engine", expected="the board it was built on")
        yield simulate(artifact_bytes(path), threads)

    def prober(self, module: nn.Module, signature: Signature, precision: Precision) -> JetsonProber:
        """Files of candidates for a board, and estimates for when there is none; see `Target.prober` and `base.Estimator`."""
        self.require()
        from .tensorrt.prober import JetsonProber

        return JetsonProber(module, signature, precision)


def _parsed(data: bytes, *, two_four: bool) -> str:
    """The verdict of NVIDIA's parser, as a note.

    Raises:
        BuildError: it refused the file; so would a Jetson's.
    """
    from .tensorrt import parser_check

    try:
        verdict = parser_check.check(data, two_four=two_four)
    except UnavailableError as error:
        return f"not seen by NVIDIA's parser: {error.found}"
    if not verdict.accepted:
        raise BuildError("NVIDIA's parser refuses the network", found=str(verdict), do="replace this operation")
    return str(verdict)


TARGET = Jetson()
