"""A torch module as a float .tflite network: NHWC, BatchNorm folded, normalisation inside, short names, no layout transposes."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...pipeline.errors import BuildError, deepest_cause
from ...pipeline.signature import Signature
from ..onnx.export import fold_batchnorm, zeros
from ..quiet import quiet
from .edit import RELUS
from .file import add_buffer, compact, constant, graph_of, op_name, read, write

INPUT_NAME = "image"
OUTPUT_NAME = "logits"
_TO_CHANNELS_FIRST = [0, 3, 1, 2]


class Normalised(nn.Module):
    """The network behind a normalisation of pixels 0..255, as a 1x1 depthwise convolution.

    It is a separate operator because it cannot be folded into a first convolution with padding: the padding is zero after
    normalisation, which is another pixel value in each channel. In int8 its weights (one a channel, with their own scale) are
    exact and its bias is within 1/250 of a pixel step.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        channels = len(mean)
        self.pixels = nn.Conv2d(channels, channels, 1, groups=channels)
        self.network = network
        spread = torch.tensor(std, dtype=torch.float64)
        with torch.no_grad():
            self.pixels.weight.copy_((1.0 / (255.0 * spread)).view(-1, 1, 1, 1))
            self.pixels.bias = nn.Parameter((-torch.tensor(mean, dtype=torch.float64) / spread).float())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits of pixels (n, C, H, W)."""
        logits: torch.Tensor = self.network(self.pixels(pixels))
        return logits


def convert(
    module: nn.Module, signature: Signature, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """The module in eval mode as a float .tflite file, batch 1, and the weights its layers have there.

    With mean and std, per channel of pixels on [0, 1], the input `image` (1, H, W, C) is pixels 0..255, the output `logits`
    (1, classes); without, inputs and outputs are as the module's. The module is not changed. Weights are by module name, as torch
    keeps them, BatchNorm folded in.

    Raises:
        BuildError: the converter refused an operator; the message names it with its module where that can be found.
    """
    folded = fold_batchnorm(module, signature)
    weights = {n: m.weight.detach().numpy() for n, m in folded.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    network = Normalised(folded, mean, std) if mean else folded
    example = zeros(signature)
    names = (tuple(example), tuple(spec.name for spec in signature.outputs))
    if mean:
        channels, height, width = signature.image_shape
        example, names = {INPUT_NAME: torch.zeros(1, height, width, channels)}, ((INPUT_NAME,), (OUTPUT_NAME,))
    try:
        with quiet(), torch.no_grad():
            import litert_torch

            litert_torch.fx_infra.decomp.add_pre_convert_decomp(torch.ops.aten.unfold.default, _unfold)
            network = litert_torch.to_channel_last_io(network.eval(), args=[0]).eval() if mean else network.eval()
            positional, named = ((), example) if signature.by_name else (tuple(example.values()), {})
            with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
                path = Path(folder) / "float.tflite"
                litert_torch.convert(network, positional, named).export(str(path))
                data = path.read_bytes()
    except Exception as error:  # the converter raises many types, all of them about the user's module
        found = culprit(module, signature, str(error)) or deepest_cause(error)
        raise BuildError("the model cannot be converted to .tflite", found=found, do="replace this operation") from error
    return tidy(data, *names), weights


def _unfold(x: torch.Tensor, dimension: int, size: int, step: int) -> torch.Tensor:
    """`aten.unfold`: a reshape where non-overlapping windows cover the whole dimension, else a gather.

    The converter's own lowering pads, which LiteRT supports for at most five dimensions.
    """
    dimension %= max(x.ndim, 1)
    if x.ndim and size == step and x.shape[dimension] % size == 0:
        return x.reshape(*x.shape[:dimension], -1, size, *x.shape[dimension + 1 :]).movedim(dimension + 1, -1)
    places = torch.arange(0, x.shape[dimension] - size + 1, step)[:, None] + torch.arange(size)
    taken = x.index_select(dimension, places.flatten())
    return taken.reshape(*x.shape[:dimension], *places.shape, *x.shape[dimension + 1 :]).movedim(dimension + 1, -1)


def tidy(data: bytes, inputs: Sequence[str] = (INPUT_NAME,), outputs: Sequence[str] = (OUTPUT_NAME,)) -> bytes:
    """The same network with short names, without the converter's notes and without transposes that a mean can do without."""
    model = read(data)
    graph = graph_of(model)
    _mean_without_transpose(model)
    _relu_once(model)
    model.metadata = [entry for entry in model.metadata or [] if entry.name == b"min_runtime_version"]
    model = compact(model)
    model.description = None
    graph.name = None
    for number, tensor in enumerate(graph.tensors):
        tensor.name = f"t{number}".encode()
    for signature in model.signatureDefs or []:
        _in_order(graph, signature, inputs, outputs)
        for names, tensor_maps in ((inputs, signature.inputs), (outputs, signature.outputs)):
            for name, tensor_map in zip(names, tensor_maps, strict=True):
                tensor_map.name = name.encode()
                graph.tensors[tensor_map.tensorIndex].name = name.encode()
    return write(model)


def _in_order(graph: Any, signature: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Sort inputs and outputs, of the signature and of the graph, as the module has them.

    The converter keeps the names of keyword arguments, and numbers what is given by position.
    """
    for part, names in (("inputs", inputs), ("outputs", outputs)):
        maps = {m.name.decode(): m for m in getattr(signature, part)}
        if maps.keys() == set(names):
            ordered = [maps[name] for name in names]
        else:
            ordered = [maps[name] for name in sorted(maps, key=lambda n: [int(number) for number in re.findall(r"\d+", n)])]
        setattr(signature, part, ordered)
        setattr(graph, part, [m.tensorIndex for m in ordered])


def _mean_without_transpose(model: Any) -> None:
    """TRANSPOSE to NCHW and MEAN over the last two axes is MEAN over the middle two."""
    graph = graph_of(model)
    for op in list(graph.operators):
        if op_name(model, op) != "TRANSPOSE" or op.outputs[0] in graph.outputs:
            continue
        order = constant(model, graph.tensors[op.inputs[1]])
        users = [user for user in graph.operators if op.outputs[0] in user.inputs]
        means = [u for u in users if op_name(model, u) == "MEAN" and not u.builtinOptions.keepDims]
        if order is None or order.tolist() != _TO_CHANNELS_FIRST or not users or len(means) < len(users):
            continue
        axes = [constant(model, graph.tensors[mean.inputs[1]]) for mean in means]
        if any(a is None or sorted(int(i) % 4 for i in a) != [2, 3] for a in axes):
            continue
        for mean in means:
            tensor = copy.copy(graph.tensors[mean.inputs[1]])
            tensor.buffer = add_buffer(model, np.array([1, 2], "<i4"))
            graph.tensors.append(tensor)
            mean.inputs = [op.inputs[0], len(graph.tensors) - 1]
        graph.operators.remove(op)


def _relu_once(model: Any) -> None:
    """Take out a RELU of what a RELU gave: what is left where a residual block between them was removed."""
    graph = graph_of(model)
    producer = {out: op for op in graph.operators for out in op.outputs}
    for op in list(graph.operators):
        before = producer.get(op.inputs[0]) if len(op.inputs) else None
        if op_name(model, op) != "RELU" or before is None or op.outputs[0] in graph.outputs:
            continue
        if op_name(model, before) == "RELU" or getattr(before.builtinOptions, "fusedActivationFunction", 0) in RELUS:
            for user in graph.operators:
                user.inputs = [op.inputs[0] if i == op.outputs[0] else i for i in user.inputs]
            graph.operators.remove(op)


def culprit(module: nn.Module, signature: Signature, message: str) -> str:
    """The operator that a converter's message names, with its module; "" if the message names none."""
    match = re.search(r"Lowering not found: (\S+)", message)
    if match is None:
        return ""
    with quiet(), torch.no_grad():
        program = torch.export.export(
            copy.deepcopy(module).eval(),
            () if signature.by_name else tuple(zeros(signature).values()),
            zeros(signature) if signature.by_name else None,
        )
        for stage in (lambda: program, program.run_decompositions):
            for node in stage().graph.nodes:
                if str(node.target) == match[1]:
                    stack = list((node.meta.get("nn_module_stack") or {}).values())
                    path = next((str(path) for path, _ in reversed(stack) if path), "")
                    return f"{match[1]} in {path or 'the forward of ' + type(module).__name__}"
    return match[1]
