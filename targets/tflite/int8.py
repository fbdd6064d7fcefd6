"""A float .tflite network quantized: int8 activations and weights (per channel), int8 weights alone, or half precision ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...calibration.ranges import Histogram, Range, count, least_weight_scale, samples
from ...pipeline.errors import BuildError
from ..base import Arrays, FloatArray
from ..quiet import quiet
from .file import constant, graph_of, op_name, read, write
from .layers import LAYER_OPS

_STEPS = 127  # of an int8 weight, to each side of zero
_NUMPY = {2: np.int32, 4: np.int64, 6: np.bool_}  # of tensor types in the schema that are not float


def collect(data: bytes, inputs: Sequence[Arrays], *, threads: int = 1) -> dict[str, Histogram]:
    """Counts of every activation of a float network on its inputs, in LiteRT without its delegate, which hides them.

    Raises:
        BuildError: an activation is NaN or infinite, or there are no inputs.
    """
    with quiet():
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        interpreter = Interpreter(
            model_content=data,
            num_threads=threads,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
        interpreter.allocate_tensors()
    places = _activations(data)
    model = read(data)
    padded = {graph_of(model).tensors[int(op.outputs[0])].name.decode() for op in _infinite_paddings(model)}
    entries = interpreter.get_input_details()

    def run(blocks: Sequence[Arrays]) -> Iterator[list[FloatArray]]:
        for sample in samples(blocks):
            for detail, array in zip(entries, sample, strict=True):
                interpreter.set_tensor(detail["index"], np.ascontiguousarray(array, dtype=detail["dtype"]))
            interpreter.invoke()
            found = {name: interpreter.get_tensor(index) for name, index in places.items()}
            yield [_without_padding(values) if name in padded else values for name, values in found.items()]

    return count(list(places), run, inputs)


def quantize(data: bytes, ranges: Mapping[str, Range], *, float_io: bool = False) -> bytes:
    """The full-integer network: int8 weights per channel, int8 activations, int32 biases.

    Ranges are those of the float network's activations, by name; every range holds 0. With `float_io` input and output stay
    float, with an operator each that converts them. Divisions stay float.

    Raises:
        BuildError: the quantizer refused the network.
    """
    model = read(data)
    graph = graph_of(model)
    if any(_infinite_paddings(model)):
        ranges = _pad_with_lowest(model, ranges)
        data = write(model)
    (signature,) = (signature.signatureKey.decode() for signature in model.signatureDefs)
    entries = [graph.tensors[int(at)] for at in graph.inputs]
    sample: dict[str, NDArray[Any]] = {
        t.name.decode(): np.zeros([int(n) for n in t.shape], _NUMPY.get(t.type, np.float32)) for t in entries
    }
    with _quantizing():
        from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe, recipe_manager
        from ai_edge_quantizer.utils import qsv_utils

        work = quantizer.Quantizer(bytearray(data), recipe.static_wi8_ai8())
        if float_io:
            for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
                work.update_quantization_recipe(".*", end, algorithm_key=recipe.AlgorithmName.NO_QUANTIZE)
        # a divisor below half a step, as the number of tokens that a mask leaves can be, rounds to 0, which the kernel refuses
        divide = qtyping.TFLOperationName.DIV
        work.update_quantization_recipe(".*", divide, algorithm_key=recipe.AlgorithmName.NO_QUANTIZE)
        manager = recipe_manager.RecipeManager()
        manager.load_quantization_recipe(work.get_quantization_recipe())
        # one sample, for the statistics of the weights; those of the activations are replaced
        measured = calibrator.Calibrator(bytearray(data), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
        measured.calibrate({signature: [sample]}, manager)
        values = measured.get_model_qsvs()
        ranks = {tensor.name.decode(): len(tensor.shape) for tensor in graph.tensors}
        for name, (low, high) in ranges.items():
            ones = (1,) * ranks[name]
            values[name] = {"min": np.full(ones, low, np.float32), "max": np.full(ones, high, np.float32)}
        widest: dict[str, FloatArray] = {}  # two layers may share weights
        for name, largest in _weight_ranges(model, ranges):
            widest[name] = np.maximum(largest, widest.get(name, largest))
        values |= {name: {"min": -largest, "max": largest} for name, largest in widest.items()}
        return _result(work, values)


def _weight_ranges(model: Any, ranges: Mapping[str, Range]) -> Iterator[tuple[str, FloatArray]]:
    """Yields names of weights with the largest value of each output channel, at least what keeps the channel's bias in int32."""
    graph = graph_of(model)
    for op in graph.operators:
        kind = op_name(model, op)
        if kind not in (*LAYER_OPS, "TRANSPOSE_CONV"):
            continue
        places = (2, 1, 3) if kind == "TRANSPOSE_CONV" else (0, 1, 2)
        given = [*op.inputs, -1]  # without a bias its place is missing, or holds -1
        tensors: list[Any] = [graph.tensors[given[at]] if given[at] >= 0 else None for at in places]
        data, weights, bias = tensors
        low, high = ranges.get(data.name.decode(), (0.0, 0.0))
        values, exact = (constant(model, tensor) if tensor is not None else None for tensor in (weights, bias))
        if values is None or exact is None or low == high:
            continue
        channels = 3 if kind == "DEPTHWISE_CONV_2D" else 0
        largest = np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != channels), keepdims=True)
        least = _STEPS * least_weight_scale(exact, (high - low) / 255)
        yield weights.name.decode(), np.maximum(largest, least.reshape(largest.shape)).astype(np.float32)


def _infinite_paddings(model: Any) -> list[Any]:
    """Returns the PADV2 operators that pad with -inf: those before max pooling."""
    graph = graph_of(model)
    found = []
    for op in graph.operators:
        value = constant(model, graph.tensors[int(op.inputs[2])]) if op_name(model, op) == "PADV2" else None
        if value is not None and np.isneginf(value).all():
            found.append(op)
    return found


def _without_padding(values: FloatArray) -> FloatArray:
    """Replaces -inf padding by the smallest finite activation, which leaves the calibrated range as it is."""
    finite = values[np.isfinite(values)]
    return np.where(np.isneginf(values), finite.min() if finite.size else 0.0, values).astype(values.dtype)


def _pad_with_lowest(model: Any, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Lets every -inf padding pad with the lower end of its input's range, in place; returns the ranges with the outputs' equal.

    int8 has no -inf, and the maxima stay the same. Each padding gets a constant of its own, because files share equal ones.
    """
    graph, found = graph_of(model), dict(ranges)
    for op in _infinite_paddings(model):
        before, after = (graph.tensors[int(at)].name.decode() for at in (op.inputs[0], op.outputs[0]))
        found[after] = found.get(before, found[after])
        tensor, buffer = (copy.copy(part) for part in _constant_parts(model, op.inputs[2]))
        buffer.data = np.full(1, found[after][0], np.float32).view(np.uint8)
        model.buffers = [*model.buffers, buffer]
        tensor.buffer, tensor.name = len(model.buffers) - 1, f"{after}/padding".encode()
        graph.tensors = [*graph.tensors, tensor]
        op.inputs = np.array([*op.inputs[:2], len(graph.tensors) - 1], np.int32)
    return found


def _constant_parts(model: Any, at: Any) -> tuple[Any, Any]:
    tensor = graph_of(model).tensors[int(at)]
    return tensor, model.buffers[tensor.buffer]


def with_int8_weights(data: bytes) -> bytes:
    """The network with int8 weights, per channel; activations stay float and are quantized as they come, image by image.

    Raises:
        BuildError: the quantizer refused the network.
    """
    with _quantizing():
        from ai_edge_quantizer import quantizer, recipe

        return _result(quantizer.Quantizer(bytearray(data), recipe.dynamic_wi8_afp32()))


def halve(data: bytes) -> bytes:
    """The network with weights in half precision; activations stay float.

    Raises:
        BuildError: the quantizer refused the network.
    """
    with _quantizing():
        from ai_edge_quantizer import qtyping, quantizer, recipe

        half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=half, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
        )
        work = quantizer.Quantizer(bytearray(data))
        operators, algorithm = qtyping.TFLOperationName.ALL_SUPPORTED, recipe.AlgorithmName.FLOAT_CASTING
        work.update_quantization_recipe(".*", operators, config, algorithm)
        return _result(work)


def _result(work: Any, values: Any = None) -> bytes:
    return write(read(bytes(work.quantize(values, enable_progress_report=False).quantized_model)))


@contextmanager
def _quantizing() -> Iterator[None]:
    """Silences the quantizer and names its refusals."""
    with quiet():
        try:
            yield
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
            found = str(error)[:500]
            raise BuildError("ai-edge-quantizer refused the network", found=found, do="try --precision fp32") from error


def _activations(data: bytes) -> dict[str, int]:
    """Name -> tensor, of every tensor that is computed, the input included."""
    model = read(data)
    graph = graph_of(model)
    found = {int(i) for i in graph.inputs} | {int(i) for op in graph.operators for i in op.outputs}
    tensors = {graph.tensors[i].name.decode(): i for i in sorted(found)}
    return {name: i for name, i in tensors.items() if constant(model, graph.tensors[i]) is None and graph.tensors[i].type == 0}
