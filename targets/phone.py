"""LiteRT on phones and boards: one .tflite file, int8, int8 weights, half precision or float, NHWC, batch 1.

The file takes pixels 0..255 (int8: the pixel minus 128) and normalises them itself; labels and standard metadata are inside. What
is measured on this machine is this machine's LiteRT, not a phone's.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipeline.errors import BuildError, UnavailableError
from ..pipeline.types import Artifact, Pattern, Precision
from .base import SAME_PP, BuildRequest, Infer, Limits, Runner
from .x86 import write_whole

if TYPE_CHECKING:
    from torch import nn

    from .tflite.metadata import Record
    from .tflite.prober import TfliteProber

EXTRA = {"litert_torch": "litert-torch", "ai_edge_quantizer": "ai-edge-quantizer", "ai_edge_litert": "ai-edge-litert"}
CONVERTER = "litert_converter"  # comes with litert-torch where it has a wheel
CONVERTS_ON = (("Linux", "x86_64"), ("Darwin", "arm64"))
CLEARLY_FASTER = 0.97  # of the other's time


class Phone:
    """The target, see `targets.base.Target`."""

    name = "phone"
    runtime = "litert"
    packages = ("litert-torch", "litert-converter", "ai-edge-quantizer", "ai-edge-litert")  # whose versions the report names
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
        return f"packages are missing ({', '.join(absent)}): pip install 'edge-compress[phone]'" if absent else None

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.tflite` and `baseline.tflite` into the request's folder.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be converted, quantized or run.
        """
        self._require()
        if request.precision not in self.limits.precisions:
            able = ", ".join(self.limits.precisions)
            raise BuildError("the phone target cannot build this precision", found=request.precision, expected=f"one of {able}")
        from .tflite.convert import convert
        from .tflite.int8 import halve, with_int8_weights
        from .tflite.metadata import Record, with_labels
        from .tflite.run import facts_of
        from .tflite.sparse import half_zero

        record = Record(request.mean, request.std, request.classes)
        request.folder.mkdir(parents=True, exist_ok=True)
        baseline, of_baseline = _baseline(request)
        network, _ = convert(request.module, request.image_shape, request.mean, request.std)
        notes: tuple[str, ...] = ()
        options: dict[str, str] = {}
        choices: tuple[str, ...] = ()
        if request.precision is Precision.INT8:
            network, notes, options, choices = _choose_int8(network, request, record)
        elif request.precision is Precision.FP16:
            network = halve(network)
            notes = (
                "fp16: weights are stored in half precision; without half-precision arithmetic they are unpacked when loaded",
            )
        elif request.precision is Precision.DYNAMIC:
            network = with_int8_weights(network)
            notes = ("dynamic: weights are int8, activations float and quantized image by image; nothing was calibrated",)
        elif half_zero(network):
            network, notes, options = _sparse_if_faster(network, request)
        files = [with_labels(annotated(data, request.image_shape, record), request.classes) for data in (network, baseline)]
        facts = facts_of(files[0], request.threads)
        return Artifact(
            target=self.name,
            file=write_whole(request.folder, "model.tflite", files[0]),
            format="tflite",
            precision=request.precision,
            input_name="image",
            input_shape=(1, *request.image_shape),
            notes=(
                *notes,
                *of_baseline,
                _takes(request),
                facts.pop("note"),
                "its latency is that of the machine it was measured on, not a phone's",
            ),
            options={**options, **facts},
            baseline=write_whole(request.folder, "baseline.tflite", files[1]),
            choices=choices,
        )

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The artifact in LiteRT on the CPU; takes any number of inputs.

        Raises:
            UnavailableError: ai-edge-litert is missing.
            BuildError: the file cannot be loaded, or LiteRT runs it without XNNPACK.
        """
        if find_spec("ai_edge_litert") is None:
            raise UnavailableError("ai-edge-litert is not installed", do="pip install 'edge-compress[phone]'")
        from .tflite.run import predictor

        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise BuildError(f"{Path(path).name} cannot be read", found=error.strerror or str(error)) from error
        yield predictor(data, threads, name=Path(path).name)

    @contextmanager
    def runner_through(self, path: Path, infer: Infer) -> Iterator[Runner]:
        """The artifact on another machine, see `targets.base.Elsewhere`; its file is read by LiteRT here."""
        from .tflite.run import predictor

        yield predictor(Path(path).read_bytes(), name=Path(path).name, infer=infer)

    def prober(self, module: nn.Module, image_shape: tuple[int, int, int], precision: Precision) -> TfliteProber:
        """Latency models of candidates, see `targets.base.Prober`.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the network cannot be converted or quantized.
        """
        self._require()
        from .tflite.prober import TfliteProber

        return TfliteProber(module, image_shape, precision)

    def _require(self) -> None:
        reason = self.missing()
        if reason:
            raise UnavailableError("the phone target cannot build here", found=reason)


def _baseline(request: BuildRequest) -> tuple[bytes, tuple[str, ...]]:
    """The dense float network, in the faster of the two forms there may be; and what was measured.

    A zero-padded shortcut becomes a slice and a padding, which cost more than the 1x1 convolution that does the same. A speedup
    over the slower form would be a gift of the conversion.
    """
    from .tflite.convert import convert
    from .tflite.run import quickest

    own, _ = convert(request.dense, request.image_shape, request.mean, request.std)
    if request.rewritten is None:
        return own, ()
    other, _ = convert(request.rewritten, request.image_shape, request.mean, request.std)
    own_ms, other_ms = quickest([own, other], request.threads)
    padded = own_ms < other_ms
    measured = f"padding {own_ms:.3f} ms, convolutions {other_ms:.3f} ms"
    note = f"dense baseline: shortcuts as {'padding' if padded else 'convolutions'}, the faster form here ({measured})"
    return (own if padded else other), (note,)


def _sparse_if_faster(network: bytes, request: BuildRequest) -> tuple[bytes, tuple[str, ...], dict[str, str]]:
    """The network with its zeros encoded where that is faster here, else as it was; why; and the same for machines."""
    from .tflite.run import quickest
    from .tflite.sparse import encode, why_dense

    reason = why_dense(network)
    if reason:
        return network, (f"zeros are stored: XNNPACK would compute them, because {reason}",), {"sparse": "no"}
    encoded = encode(network)
    dense_ms, sparse_ms = quickest([network, encoded], request.threads)
    measured = f"sparse weights take {sparse_ms / dense_ms:.2f} of the time of dense ones here"
    if sparse_ms > CLEARLY_FASTER * dense_ms:
        return network, (f"zeros are stored: {measured} (XNNPACK skips zeros on Arm, not on x86 with AVX)",), {"sparse": "no"}
    return encoded, (f"zeros are skipped: {measured}",), {"sparse": "yes"}


def _choose_int8(
    network: bytes, request: BuildRequest, record: Record
) -> tuple[bytes, tuple[str, ...], dict[str, str], tuple[str, ...]]:
    """The int8 network of the ranges that cost least on the search split; notes; options; what was tried."""
    from ..calibration.ranges import METHODS, ranges
    from .onnx.int8 import COMPENSATED, STEPS
    from .tflite.convert import INPUT_NAME, convert
    from .tflite.int8 import collect, quantize
    from .tflite.run import pixels, predictor

    float_top1 = request.score(predictor(network, request.threads, record=record))

    def tried(weights: bytes, methods: Iterable[str]) -> Iterator[tuple[str, bytes, float]]:
        seen = collect(weights, [pixels(block, record) for block in request.calibration], threads=request.threads)
        for method in methods:
            found = ranges(seen, method)
            if record.mean:
                found[INPUT_NAME] = (0.0, 255.0)  # steps of one pixel, exactly
            data = quantize(weights, found, float_io=request.float_io)
            yield method, data, request.score(predictor(data, request.threads, record=record))

    made, top1 = {}, {}
    for method, data, score in tried(network, METHODS):
        made[method], top1[method] = data, score
    best = next(method for method in METHODS if top1[method] >= max(top1.values()) - SAME_PP)
    chosen, reached, rounding = made[best], top1[best], "nearest"
    choices = [f"float: {float_top1:.2f} %", *(f"{method} ranges: {value:.2f} %" for method, value in top1.items())]
    if reached < float_top1 - request.max_drop_pp and request.rounded is not None:
        rounded, _ = convert(request.rounded(STEPS[8]), request.image_shape, request.mean, request.std)
        for _, data, score in tried(rounded, [best]):
            choices.append(f"{best} ranges, weights {COMPENSATED}: {score:.2f} %")
            if score > reached + SAME_PP:
                chosen, reached, rounding = data, score, "compensated"
    drop = float_top1 - reached
    cost = f"{reached:.2f} % against {float_top1:.2f} % in float"
    how = f"{best} ranges" + (f", weights {COMPENSATED}" if rounding == "compensated" else "")
    notes = [f"int8: {how}, chosen on the search split ({cost})"]
    if drop > request.max_drop_pp:
        notes.append(f"int8 costs {drop:.2f} points on the search split, more than the {request.max_drop_pp:.2f} aimed at")
    options = {"ranges": best, "rounding": rounding, "activation_type": "int8", "float_io": str(request.float_io).lower()}
    return chosen, tuple(notes), options, tuple(choices)


def annotated(data: bytes, image_shape: tuple[int, int, int], record: Record) -> bytes:
    """The file with the standard metadata and our own record in it."""
    from .tflite.metadata import OWN, STANDARD, put, standard

    return put(data, {STANDARD: standard(image_shape, record), OWN: record.to_bytes()})


def _takes(request: BuildRequest) -> str:
    pixels = "pixels 0..255, normalised by the first operator (a 1x1 depthwise convolution)" if request.mean else "network inputs"
    if request.precision is Precision.INT8 and not request.float_io:
        return f"input: int8 NHWC, {pixels}{'; int8 is the pixel minus 128' if request.mean else ''}; output: int8 logits"
    return f"input: float32 NHWC, {pixels}; output: float32 logits"


TARGET = Phone()
