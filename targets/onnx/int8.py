"""A float ONNX network as an int8 QDQ network for ONNX Runtime on x86: unsigned activations, signed weights per channel.

Beside it what every ONNX target shares: recipes, activation counts, half precision.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from ...calibration.ranges import Histogram, Range, collect
from ...pipeline.errors import BuildError
from ..base import BuildRequest, Images
from .edit import STEM_PAD, bare_outputs, layers, pad_stem, used_opsets

STEPS = {8: 127, 7: 64}  # weight bits -> the largest integer of a row, see `quantize`


@dataclass(frozen=True)
class Recipe:
    """How a network is quantized.

    Activations are uint8 and weights int8: with signed activations ONNX Runtime has no direct kernels on x86 and is slower
    than in float.
    """

    ranges: str  # a name of calibration.ranges.METHODS
    weight_bits: int  # 8, or 7 where 8 saturate the 16-bit sums of processors without VNNI
    float_layers: tuple[str, ...] = ()  # left in float
    compensated: bool = False  # GPTQ: each weight's rounding makes up for that of those before it, see `BuildRequest.rounded`

    def __str__(self) -> str:
        kept = f", {' and '.join(self.float_layers)} in float" if self.float_layers else ""
        how = " rounded by GPTQ" if self.compensated else ""
        return f"{self.ranges} ranges, {self.weight_bits}-bit weights{how}{kept}"


def quantize(model: onnx.ModelProto, ranges: Mapping[str, Range], recipe: Recipe) -> onnx.ModelProto:
    """The QDQ network; ranges are those of the float network's tensors, by name. Equal arguments give equal bytes.

    Raises:
        BuildError: the quantizer refused the network.
    """
    found = layers(model)
    unknown = [name for name in recipe.float_layers if name not in found]
    if unknown:
        raise BuildError(f"layer {unknown[0]} cannot be left in float", found="no such layer in the exported graph")
    excluded = [found[name].node for name in recipe.float_layers]
    first = next(iter(found), "")
    source = onnx.ModelProto()
    source.CopyFrom(model if first in recipe.float_layers else pad_stem(model))
    known = dict(ranges)
    image = model.graph.input[0].name
    if image in known:  # the added channels are zero, and 0 is in every range
        known[f"{image}_padded"] = known[image]
    shaped = onnx.shape_inference.infer_shapes(source)
    add_infer_metadata(shaped)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in known.items()}
    try:
        with quiet():
            quantizer = QDQQuantizer(
                shaped,
                per_channel=True,
                reduce_range=recipe.weight_bits == 7,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, data),
                nodes_to_quantize=[],
                nodes_to_exclude=[*excluded, STEM_PAD],
                op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry}),  # what quantize_static takes by default
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
    except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        raise BuildError("onnxruntime.quantization refused the network", found=str(error), do="try --precision fp32") from error
    result = bare_outputs(quantizer.model.model)
    del result.metadata_props[:]
    opsets = used_opsets(result)
    del result.opset_import[:]
    result.opset_import.extend(opsets)
    return result


def histograms(network: onnx.ModelProto, request: BuildRequest) -> Mapping[str, Histogram]:
    """Counts of a float network's activations on the calibration images.

    The last ones are kept: targets that are built from one network in one run share them.
    """
    return _collected(network.SerializeToString(deterministic=True), _Images(request.calibration), request.threads)


@lru_cache(maxsize=1)
def _collected(network: bytes, images: _Images, threads: int) -> Mapping[str, Histogram]:
    return collect(onnx.load_model_from_string(network), images.arrays, threads=threads)


class _Images:
    """Arrays that are equal when their bytes are."""

    def __init__(self, arrays: Sequence[Images]) -> None:
        self.arrays = arrays
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
        self._digest = digest.hexdigest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Images) and other._digest == self._digest


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in half precision between a float input and a float output. Leaves its argument as it is."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    with quiet():
        half: onnx.ModelProto = convert_float_to_float16(copied, keep_io_types=True, disable_shape_infer=False)
    del half.graph.value_info[:]
    return half


def ends(model: onnx.ModelProto) -> tuple[str, str]:
    """The first convolution and the last linear layer: what suffers most from int8 and costs least in float."""
    names = list(layers(model))
    return names[0], names[-1]


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies int8 without saturating; False where that cannot be read."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split(":", 1)[-1].split()}
    return bool(flags & {"avx512_vnni", "avx_vnni"})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The quantizer reports each step to the root logger."""
    root = logging.getLogger()
    level = root.level
    try:
        root.setLevel(logging.CRITICAL)
        yield
    finally:
        root.setLevel(level)
