"""The range of every activation of a network, from calibration inputs: what an int8 scale is made of.

`collect` runs the float network over the inputs and counts values; each method of `METHODS` turns the counts of a tensor into a
range. A range always holds 0, because zero padding and ReLU need it exact.

Attention masks add -inf, torch.finfo.min or -1e9 to scores. Such values are not counted: a scale that reached them would have
one step for all scores. They saturate, `MASK_ROOM` below what was counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from ..pipeline.errors import BuildError

FloatArray = NDArray[np.float32]
Arrays = NDArray[Any] | tuple[NDArray[Any], ...]  # network inputs: one tensor, or several in order
Range = tuple[float, float]
Run = Callable[[Sequence[Arrays]], Iterator[list[FloatArray]]]  # all activations, one input after another

BINS = 2048
MASKED = -1e4  # what is lower is a mask, where all else is within `SCORES`: Hugging Face's add -1e4 and less
SCORES = 1e3  # audio samples of 16 bits, for one, have large values of both signs
# below what is counted: exp(-12) of a softmax is nothing beside one step of int8; a mask alone is added to scores of any size
MASK_ROOM, MASK_ALONE = 12.0, 512.0


@dataclass(frozen=True)
class Histogram:
    """Histogram of a tensor's values, in equal bins from `lowest` to `highest`."""

    lowest: float
    highest: float
    counts: NDArray[np.int64]  # (bins,)
    masked: bool = False  # whether an attention mask, which is not counted, was in it

    def edges(self) -> NDArray[np.float64]:
        """Borders of the bins, (bins + 1,)."""
        return np.linspace(self.lowest, self.highest, len(self.counts) + 1)


def collect(model: onnx.ModelProto, inputs: Sequence[Arrays], *, bins: int = BINS, threads: int = 1) -> dict[str, Histogram]:
    """Counts of every float activation of the network, its input included.

    The inputs are run twice, once for the extremes and once for the counts, so memory does not grow with their number.

    The network has static shapes, batch 1; inputs are arrays, or tuples of arrays, with the samples along axis 0.

    Raises:
        BuildError: an activation is NaN or infinite, or there are no inputs.
    """
    names, clipped, run = _instrument(model, threads)
    seen = count(names, run, inputs, bins=bins)
    return seen | {before: seen[after] for before, after in clipped.items()}


def count(names: Sequence[str], run: Run, inputs: Sequence[Arrays], *, bins: int = BINS) -> dict[str, Histogram]:
    """Counts of activations, whatever runtime they come from; it is run twice over the inputs.

    `run` yields the activations, in the order of `names`, for one input after another.

    Raises:
        BuildError: an activation is NaN or infinite, but for -infinity as a mask, or there are no inputs.
    """
    lowest = np.full(len(names), np.inf)
    unmasked = np.full(len(names), np.inf)  # the lowest value above `MASKED`
    highest = np.full(len(names), -np.inf)
    for values in run(inputs):
        for i, value in enumerate(values):
            least = value.min()
            lowest[i] = np.minimum(lowest[i], least)  # NaN stays NaN
            value = value[value > MASKED] if least <= MASKED else value
            unmasked[i] = np.minimum(unmasked[i], value.min(initial=np.inf))
            highest[i] = np.maximum(highest[i], value.max(initial=-np.inf))
    masked = (lowest <= MASKED) & (unmasked > -SCORES) & (highest < SCORES)
    only = masked & (unmasked > highest)  # there was nothing but masks
    highest[only] = unmasked[only] = 0.0
    lowest = np.where(masked, unmasked, lowest)
    if not np.isfinite(lowest).all() or not np.isfinite(highest).all():
        bad = names[int(np.argmin(np.isfinite(lowest) & np.isfinite(highest)))]
        found = (
            f"NaN, infinity or nothing in {sum(len(block[0] if isinstance(block, tuple) else block) for block in inputs)} inputs"
        )
        what = f"the calibration inputs give no finite range for {bad}"
        raise BuildError(what, found=found, do="check the weights and the images")
    span = np.where(highest > lowest, highest - lowest, 1.0)
    counts = np.zeros((len(names), bins), np.int64)
    for values in run(inputs):
        for i, value in enumerate(values):
            if masked[i]:
                value = value[value > MASKED]
            at = ((value.ravel() - np.float32(lowest[i])) * np.float32(bins / span[i])).astype(np.int32)
            counts[i] += np.bincount(np.clip(at, 0, bins - 1, out=at), minlength=bins)
    return {n: Histogram(float(lowest[i]), float(highest[i]), counts[i], bool(masked[i])) for i, n in enumerate(names)}


def samples(blocks: Sequence[Arrays]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yields the inputs of one sample after another, batch 1."""
    for block in blocks:
        each = block if isinstance(block, tuple) else (block,)
        for at in range(len(each[0])):
            yield tuple(array[at : at + 1] for array in each)


def min_max(seen: Histogram) -> Range:
    """Everything that was seen."""
    return min(seen.lowest, 0.0), max(seen.highest, 0.0)


def percentile(seen: Histogram, percent: float) -> Range:
    """The range that holds `percent` of the values; the rest is cut off in equal parts at both ends."""
    tail = (100.0 - percent) / 200.0 * seen.counts.sum()
    below = np.cumsum(seen.counts)
    edges = seen.edges()
    low = edges[int(np.searchsorted(below, tail, side="right"))]
    high = edges[int(np.searchsorted(below, below[-1] - tail, side="left")) + 1]
    return min(float(low), 0.0), max(float(high), 0.0)


def entropy(seen: Histogram, stride: int = 8) -> Range:
    """The clipping that loses least of the distribution: smallest Kullback-Leibler divergence from float to int8.

    S. Migacz, "8-bit Inference with TensorRT", GTC 2017, on absolute values: 255 steps where nothing is negative, 127 else.
    """
    top = max(abs(seen.lowest), abs(seen.highest))
    bins = len(seen.counts)
    if top == 0.0:
        return 0.0, 0.0
    middles = np.abs((seen.edges()[:-1] + seen.edges()[1:]) / 2)
    at = np.minimum((middles * (bins / top)).astype(np.int64), bins - 1)
    counts = np.bincount(at, weights=seen.counts, minlength=bins).astype(np.float64)
    counts[0] = 0.0  # zero is exact in every range, and ReLU piles half of the values there
    steps = 255 if seen.lowest >= 0.0 else 127
    best, keep = np.inf, bins
    for size in range(bins, steps - 1, -stride):  # equal divergence: the wider range
        divergence = _divergence(counts, size, steps)
        if divergence < best:
            best, keep = divergence, size
    limit = top * keep / bins
    return max(min(seen.lowest, 0.0), -limit), min(max(seen.highest, 0.0), limit)


def _divergence(counts: NDArray[np.float64], size: int, steps: int) -> float:
    """KL divergence between the counts clipped at `size` bins and the same seen through `steps` values."""
    clipped = counts[:size].copy()
    filled = clipped > 0
    clipped[-1] += counts[size:].sum()
    total = clipped.sum()
    if total == 0:
        return np.inf
    starts = np.linspace(0, size, steps, endpoint=False).astype(np.int64)
    lengths = np.diff(np.append(starts, size))
    sums = np.add.reduceat(counts[:size], starts)
    holders = np.add.reduceat(filled.astype(np.float64), starts)
    each = np.divide(sums, holders, out=np.zeros_like(sums), where=holders > 0)
    coarse = np.where(filled, np.repeat(each, lengths), 0.0)
    p = clipped / total
    q = np.maximum(coarse / max(coarse.sum(), 1.0), 1e-12)
    where = p > 0
    return float((p[where] * np.log(p[where] / q[where])).sum())


# what a recipe can ask for, simplest first
METHODS: Mapping[str, Callable[[Histogram], Range]] = {
    "min-max": min_max,
    "percentile-99.999": partial(percentile, percent=99.999),
    "percentile-99.99": partial(percentile, percent=99.99),
    "entropy": entropy,
}


def ranges(histograms: Mapping[str, Histogram], method: str) -> dict[str, Range]:
    """The range of every tensor by one method.

    Raises:
        KeyError: no such method.
    """
    rule = METHODS[method]
    return {name: _below(rule(seen), seen) if seen.masked else rule(seen) for name, seen in histograms.items()}


def _below(counted: Range, seen: Histogram) -> Range:
    """The range with room for masks."""
    low, high = counted
    return low - (MASK_ROOM if seen.highest > seen.lowest else MASK_ALONE), high


def least_weight_scale(bias: NDArray[Any], input_scale: float) -> NDArray[np.float64]:
    """The scales, per output channel, that weights need at least for their bias to fit into int32.

    An int32 bias is in steps of input scale times weight scale. With almost zero weights, as of a channel that makes a constant,
    these would be so small that the bias saturates. Half of int32 is left to the sum of products.
    """
    least: NDArray[np.float64] = np.abs(bias.astype(np.float64)) / (input_scale * 2.0**30)
    return least


def leaves_out_zero(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node is a Clip to limits that do not hold 0: an int8 range, which always does, cannot take its place."""
    if node.op_type != "Clip":
        return False
    low, high = (constants.get(name) for name in (*node.input[1:], "", "")[:2])
    above = low is not None and bool((onnx.numpy_helper.to_array(low) > 0).any())
    return above or (high is not None and bool((onnx.numpy_helper.to_array(high) < 0).any()))


def _instrument(model: onnx.ModelProto, threads: int) -> tuple[list[str], dict[str, str], Run]:
    """Names of the float activations; those that only a Relu or Clip uses, with its output; and a way to run over inputs."""
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    floats = {
        v.name: v
        for v in (*graph.input, *graph.value_info, *graph.output)
        if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    made = [name for node in graph.node for name in node.output if name in floats]
    present = {o.name for o in graph.output}
    constants = {i.name: i for i in graph.initializer}
    # what goes into a Relu alone is never stored in int8: the quantizer folds the Relu into the layer
    only_user = {n: users[n][0] for n in made if len(users.get(n, [])) == 1 and n not in present}
    folded = {n: u for n, u in only_user.items() if u.op_type in ("Relu", "Clip") and not leaves_out_zero(u, constants)}
    clipped = {n: user.output[0] for n, user in folded.items()}
    clipped = {before: after for before, after in clipped.items() if after in floats and after not in clipped}
    entries = [(v.name, onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)) for v in graph.input]
    names = [name for name in made if name not in clipped]
    graph.output.extend(floats[name] for name in names if name not in present)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside PyTorch's threads it slows both down
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(inferred.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Arrays]) -> Iterator[list[FloatArray]]:
        for sample in samples(inputs):
            given = {name: np.ascontiguousarray(a, dtype=dtype) for (name, dtype), a in zip(entries, sample, strict=True)}
            yield [*(given[name] for name in float_inputs), *session.run(names, given)]

    float_inputs = [name for name, dtype in entries if dtype == np.float32]
    return [*float_inputs, *names], clipped, run
