"""LiteRT on phones and boards: one .tflite file, int8, int8 weights, half precision or float, NHWC, batch 1.

The file takes pixels 0..255 (int8: the pixel minus 128) and normalises them itself; labels and standard metadata are inside. What
is measured on this machine is this machine's LiteRT, not a phone's.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipeline.errors import UnavailableError, install_hint
from ..pipeline.options import Pattern, Precision
from ..pipeline.signature import Signature
from ..pipeline.types import Artifact
from .base import BuildRequest, Converted, Infer, Interface, Limits, Runner, Target, artifact_bytes
from .onnx.target import taken

if TYPE_CHECKING:
    from torch import nn

    from .tflite.prober import TfliteProber

EXTRA = {"litert_torch": "litert-torch", "ai_edge_quantizer": "ai-edge-quantizer", "ai_edge_litert": "ai-edge-litert"}
CONVERTER = "litert_converter"  # comes with litert-torch where it has a wheel
CONVERTS_ON = (("Linux", "x86_64"), ("Darwin", "arm64"))


class Phone(Target):
    """The target, see `targets.base.Target`."""

    name = "phone"
    runtime = "litert"
    packages = ("litert-torch", "litert-converter", "ai-edge-quantizer", "ai-edge-litert")  # whose versions the report names
    takes_pixels = True
    limits = Limits(
        channel_multiple=8,
        precisions=(Precision.INT8, Precision.FP32, Precision.FP16, Precision.DYNAMIC),
        patterns=(Pattern.CHANNEL, Pattern.WEIGHT, Pattern.TWO_FOUR),  # the last two are zeros, which most networks only store
    )

    def missing(self) -> str | None:
        """Why artifacts cannot be built here; None when they can."""
        here = (platform.system(), platform.machine())
        if here not in CONVERTS_ON and find_spec(CONVERTER) is None:
            return (
                f"litert-converter has no wheel for {' '.join(here)}: convert on Linux x86_64 or macOS arm64, run the file here"
            )
        absent = [package for module, package in {**EXTRA, CONVERTER: "litert-converter"}.items() if find_spec(module) is None]
        return f"packages are missing ({', '.join(absent)}): {install_hint('phone')}" if absent else None

    def baseline(self, module: nn.Module, interface: Interface) -> bytes:
        """The float file of a dense network, see `targets.base.Target`."""
        self.require()
        from .tflite.convert import convert
        from .tflite.metadata import Record, described

        network, _ = convert(module, interface.signature, interface.mean, interface.std)
        return described(network, interface.signature, Record(interface.mean, interface.std, interface.classes))

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.tflite` and `baseline.tflite` into the request's folder; see `Target.build`."""
        self.require(request.precision)
        from .tflite.convert import convert
        from .tflite.int8 import halve, with_int8_weights
        from .tflite.metadata import Record, described
        from .tflite.run import facts_of, sides_of
        from .tflite.sparse import half_zero

        network, _ = convert(request.module, request.signature, request.mean, request.std)
        converted = Converted(network)
        if request.precision is Precision.INT8:
            converted = _int8(network, request)
        elif request.precision is Precision.FP16:
            note = "fp16: weights are stored in half precision; without half-precision arithmetic they are unpacked when loaded"
            converted = Converted(halve(network), (note,))
        elif request.precision is Precision.DYNAMIC:
            note = "dynamic: weights are int8, activations float and quantized image by image; nothing was calibrated"
            converted = Converted(with_int8_weights(network), (note,))
        elif half_zero(network):
            converted = _sparse_if_faster(network, request)
        record = Record(request.mean, request.std, request.classes)
        data = described(converted.network, request.signature, record)
        facts = facts_of(data, request.threads)
        own = "its latency is that of the machine it was measured on, not a phone's"
        notes = (_takes(request), facts.pop("note"), own)
        sides = sides_of(data, request.signature, pixels=bool(request.mean))
        return self.artifact(request, converted, data, "tflite", sides, *notes, **facts)

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The artifact in LiteRT on the CPU, with XNNPACK; see `Target.runner`."""
        if find_spec("ai_edge_litert") is None:
            raise UnavailableError("ai-edge-litert is not installed", do=install_hint("phone"))
        from .tflite.run import predictor

        yield predictor(artifact_bytes(path), threads, name=Path(path).name)

    @contextmanager
    def runner_through(self, path: Path, infer: Infer) -> Iterator[Runner]:
        """The artifact on another machine, see `targets.base.Elsewhere`; its file is read by LiteRT here."""
        from .tflite.run import predictor

        yield predictor(Path(path).read_bytes(), name=Path(path).name, infer=infer)

    def prober(self, module: nn.Module, signature: Signature, precision: Precision) -> TfliteProber:
        """Latency models of candidates; see `Target.prober`."""
        self.require()
        from .tflite.prober import TfliteProber

        return TfliteProber(module, signature, precision, pixels=signature.is_image_classifier)


def _sparse_if_faster(network: bytes, request: BuildRequest) -> Converted[bytes]:
    """The network with its zeros encoded where that is faster on the device, else as it was; and why."""
    from .tflite.sparse import encode, why_dense

    reason = why_dense(network) or ("" if request.speedup else "there is no device to measure on")
    if reason:
        return Converted(network, (f"zeros are stored: XNNPACK would compute them, because {reason}",), {"sparse": "no"})
    assert request.speedup is not None  # the reason above
    encoded = encode(network)
    with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
        dense, sparse = (Path(folder) / name for name in ("dense.tflite", "sparse.tflite"))
        dense.write_bytes(network)
        sparse.write_bytes(encoded)
        found = request.speedup(dense, sparse)
    low, high = found.ci95
    measured = f"sparse weights are {found.median:.2f} times as fast as dense ones (95 % interval {low:.2f} to {high:.2f})"
    if low <= 1.0:
        note = f"zeros are stored: {measured}; XNNPACK skips zeros on Arm, not on x86 with AVX"
        return Converted(network, (note,), {"sparse": "no"})
    return Converted(encoded, (f"zeros are skipped: {measured}",), {"sparse": "yes"})


def _int8(network: bytes, request: BuildRequest) -> Converted[bytes]:
    """The int8 network that costs least on the search split."""
    from collections.abc import Mapping

    from ..calibration.ranges import Range
    from .int8_choice import Int8Format, choose_int8
    from .onnx.int8 import Recipe
    from .tflite.convert import INPUT_NAME, convert
    from .tflite.int8 import collect, quantize
    from .tflite.run import predictor

    def quantized(data: bytes, found: Mapping[str, Range], recipe: Recipe) -> bytes:
        exact = {INPUT_NAME: (0.0, 255.0)} if request.mean else {}  # steps of one pixel
        return quantize(data, {**found, **exact}, float_io=request.float_io)

    how = Int8Format(
        activation_type="int8",
        export=lambda module: convert(module, request.signature, request.mean, request.std)[0],
        collect=lambda data: collect(data, request.calibration, threads=request.threads),
        quantize=quantized,
        load=lambda data: predictor(data, request.threads),
    )
    chosen = choose_int8(network, request, how)
    return replace(chosen, options=chosen.options | {"float_io": str(request.float_io).lower()})


def _takes(request: BuildRequest) -> str:
    if not request.mean:
        whole = request.precision is Precision.INT8 and not request.float_io
        return f"{taken(request.signature, ())}{'; float ones as int8 steps, see their scale and zero point' if whole else ''}"
    pixels = "pixels 0..255, normalised by the first operator (a 1x1 depthwise convolution)"
    if request.precision is Precision.INT8 and not request.float_io:
        return f"input: int8 NHWC, {pixels}; int8 is the pixel minus 128; output: int8 logits"
    return f"input: float32 NHWC, {pixels}; output: float32 logits"


TARGET = Phone()
