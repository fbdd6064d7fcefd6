"""A float ONNX network as an int8 QDQ network for ONNX Runtime on x86: unsigned activations, signed weights per channel.

Beside it what every ONNX target shares: recipes, activation counts, half precision.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from ...calibration.ranges import MASKED, Histogram, Range, collect, leaves_out_zero
from ...pipeline.errors import BuildError
from ..base import BuildRequest
from .edit import STEM_PAD, bare_outputs, bias_apart, pad_stem, read_floats
from .export import quiet
from .graph import LAYER_OPS, Graph

_collected: dict[tuple[bytes, bytes, int], Mapping[str, Histogram]] = {}  # the last counts, see `histograms`
STEPS = {8: 127, 7: 64}  # weight bits -> the largest integer of a row, see `quantize`


@dataclass(frozen=True)
class Recipe:
    """Settings of a quantization.

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
        BuildError: the quantizer refused the network, or a layer to leave in float is not in it.
    """
    graph = Graph(model)
    first = next((name for name, _ in graph.layers()), "")
    apart = [node.name for node in graph.nodes if leaves_out_zero(node, graph.constants) or _masks(graph, node)]
    source = model if first in recipe.float_layers else pad_stem(model)
    between = between_token_layers(graph)
    source = bias_apart(source) if between else source
    image = model.graph.input[0].name
    # the added channels are zero, and 0 is in every range
    padded = {f"{image}_padded": ranges[image]} if image in ranges else {}
    result = insert_pairs(
        source,
        {**ranges, **padded},
        instead="--precision fp32",
        activation_qType=QuantType.QUInt8,
        reduce_range=recipe.weight_bits == 7,
        nodes_to_quantize=[],  # all
        nodes_to_exclude=[*float_nodes(model, recipe), STEM_PAD, *apart, *between],
        op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry}),  # what quantize_static takes by default
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]} if between else {},
    )
    return without_notes(bare_outputs(read_floats(result, between) if between else result))


def between_token_layers(graph: Graph) -> list[str]:
    """Names of the operators on tokens that are no linear layers, up to the next convolution; [] without LayerNorm and attention.

    They stay in float: the few large values of residual streams and of scores leave int8 no steps for the others (of a sentence
    encoder's nearest neighbours 45 % were kept, with these in float 82 %), and ONNX Runtime is as fast without int8 there.
    """
    linear = {id(node) for node in graph.nodes if node.op_type in ("Gemm", "MatMul") and graph.weight(node)[0]}
    begins = {id(node) for node in graph.nodes if node.op_type == "LayerNormalization" or _attends(graph, node)}
    if not begins:
        return []
    begins |= {id(node) for node in graph.nodes if node.op_type == "MatMul" and id(node) in linear}
    tokens, found = set[str](), list[str]()
    for node in graph.nodes:
        if node.op_type not in ("Conv", "ConvTranspose") and (id(node) in begins or not tokens.isdisjoint(node.input)):
            tokens.update(node.output)
            found += [] if id(node) in linear else [node.name]
    return found


def _masks(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node makes a mask from a constant that no int8 scale can hold beside other values, such as torch.finfo.min."""
    constants = (graph.array(name) for name in node.input if node.op_type not in LAYER_OPS)
    return any(c is not None and c.dtype == np.float32 and c.size and bool(c.min() <= MASKED) for c in constants)


def _attends(graph: Graph, node: onnx.NodeProto) -> bool:
    return node.op_type == "Softmax" and any(user.op_type == "MatMul" for user in graph.consumers[node.output[0]])


def float_nodes(model: onnx.ModelProto, recipe: Recipe) -> list[str]:
    """Names of the nodes a recipe leaves in float.

    Raises:
        BuildError: the network has no such layer.
    """
    found = Graph(model).layers()
    unknown = set(recipe.float_layers) - {name for name, _ in found}
    if unknown:
        raise BuildError(f"layer {min(unknown)} cannot be left in float", found="no such layer in the exported graph")
    return [node.name for name, node in found if name in recipe.float_layers]


def insert_pairs(
    model: onnx.ModelProto, ranges: Mapping[str, Range], *, instead: str, tensors: Iterable[str] = (), **settings: Any
) -> onnx.ModelProto:
    """The network with Q/DQ pairs and int8 weights per channel, by ONNX Runtime's quantizer.

    `tensors` are activations that get a pair whatever reads them, `settings` further arguments of `QDQQuantizer`.

    Raises:
        BuildError: the quantizer refused the network; the message suggests `instead`.
    """
    shaped = onnx.shape_inference.infer_shapes(model)
    add_infer_metadata(shaped)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    try:
        with quiet():
            quantizer = QDQQuantizer(
                shaped,
                per_channel=True,
                weight_qType=QuantType.QInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, data),
                **settings,
            )
            for tensor in tensors:
                quantizer.quantize_activation_tensor(tensor)
            quantizer.quantize_model()
            quantizer.model.topological_sort()
    except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        raise BuildError("onnxruntime.quantization refused the network", found=str(error), do=f"try {instead}") from error
    result: onnx.ModelProto = quantizer.model.model
    return result


def without_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, changed in place, without metadata and without the operator sets it does not use, which tools leave in it."""
    del model.metadata_props[:]
    domains = {node.domain for node in model.graph.node}
    for entry in [entry for entry in model.opset_import if entry.domain not in domains]:
        model.opset_import.remove(entry)
    return model


def histograms(network: onnx.ModelProto, request: BuildRequest) -> Mapping[str, Histogram]:
    """Counts of a float network's activations on the calibration images.

    The last ones are kept: targets that are built from one network in one run share them.
    """
    digest = hashlib.sha256()
    for block in request.calibration:
        for array in block if isinstance(block, tuple) else (block,):
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
    key = (network.SerializeToString(deterministic=True), digest.digest(), request.threads)
    if key not in _collected:
        _collected.clear()
        _collected[key] = collect(network, request.calibration, threads=request.threads)
    return _collected[key]


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network in half precision between a float input and a float output. Leaves its argument as it is."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    with quiet():
        half: onnx.ModelProto = convert_float_to_float16(copied, keep_io_types=True, disable_shape_infer=False)
    del half.graph.value_info[:]
    return half


def ends(model: onnx.ModelProto) -> tuple[str, tuple[str, ...]]:
    """The first layer, and the last one of each output: what suffers most from int8 and costs least in float.

    Of a residual sum the operand is followed that a layer is nearer to: a stream would lead to all of its branches.
    """
    graph = Graph(model)
    names = {id(node): name for name, node in graph.layers()}
    known: dict[str, tuple[float, tuple[str, ...]]] = {}  # tensor -> nodes back to the nearest layer, and the last layers
    for node in graph.nodes:
        found: tuple[float, tuple[str, ...]] = (0, (names.get(id(node), ""),))
        if id(node) not in names:
            before = [known[name] for name in node.input if name in known]
            nearest = min((depth for depth, _ in before), default=math.inf)
            followed = (layers for depth, layers in before if node.op_type != "Add" or depth == nearest)
            found = nearest + 1, tuple(dict.fromkeys(chain.from_iterable(followed)))
        known.update(dict.fromkeys(node.output, found))
    last = dict.fromkeys(chain.from_iterable(known[value.name][1] for value in model.graph.output if value.name in known))
    return next(iter(names.values()), ""), tuple(last)


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies int8 without saturating; False where that cannot be read."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split(":", 1)[-1].split()}
    return bool(flags & {"avx512_vnni", "avx_vnni"})
