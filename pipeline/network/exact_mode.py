"""Contexts for exact curvature (FP32, eval mode), and the layers that have one.

BatchNorm and dropout are in eval mode. All arithmetic is float32 (float64 for a float64 module): autocast, TF32 and bfloat16
matrix products are switched off inside, since a difference of nearly equal gradients keeps nothing of ten mantissa bits. Modes,
flags, gradients and weights are left as they were found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .calling import count_of
from .modes import borrowed

Batch = tuple[Tensor, Tensor]  # inputs (N, C, H, W), labels (N,)
Layer = nn.Conv2d | nn.Linear


def weight_layers(module: nn.Module) -> dict[str, Layer]:
    """Convolutions and linear layers by name, in the module's order.

    Raises:
        InputError: two layers share a weight, a weight is computed (a parametrization), or there is no such layer.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}
    owners: dict[int, str] = {}
    for name, layer in found.items():
        if layer._parameters.get("weight") is None:
            what = f"the weight of layer {name!r} is not a parameter of its own"
            raise InputError(what, expected="a plain weight", do="remove the parametrization (weight norm and the like) first")
        if id(layer.weight) in owners:
            what = f"layers {owners[id(layer.weight)]!r} and {name!r} share one weight"
            raise InputError(what, expected="one weight for each layer", do="give each layer a copy")
        owners[id(layer.weight)] = name
    if not found:
        raise InputError(
            "the model has nothing to prune", found="no Conv2d and no Linear layer", do="give a convolutional network"
        )
    return found


@contextmanager
def exact_arithmetic(device: str) -> Iterator[None]:
    """Full float32 products inside, on every device: no autocast, TF32 or bfloat16."""
    # cuDNN's TF32 is on by default; the CPU's bfloat16 products come with torch.set_float32_matmul_precision("medium").
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    parts: tuple[tuple[Any, str], ...] = ((cudnn, "conv"), (cuda, "matmul"), (mkldnn, "conv"), (mkldnn, "matmul"))
    backends = [getattr(owner, part) for owner, part in parts]
    precisions = [(backend, backend.fp32_precision) for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for backend, precision in precisions:
            backend.fp32_precision = precision


@contextmanager
def steady(module: nn.Module) -> Iterator[Tensor]:
    """Eval mode and exact float32 inside; modes and flags are restored. Yields a weight, for its device and dtype."""
    place = next(iter(weight_layers(module).values())).weight.detach()
    if place.dtype not in (torch.float32, torch.float64):
        raise InputError("curvature needs full precision", found=str(place.dtype), expected="float32 weights", do="call .float()")
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    with borrowed(module), torch.inference_mode(False), torch.enable_grad(), exact_arithmetic(place.device.type):
        module.eval()
        try:
            for parameter, _ in wanted:
                parameter.requires_grad_(True)  # a frozen layer has a curvature too
            yield place
        finally:
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)


@contextmanager
def watched(layers: Mapping[str, Layer], record: Callable[[str, Layer, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `record(name, layer, input, output)` at every call of a layer."""

    def hook(name: str, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        record(name, layer, args[0].detach(), output)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(hook, name)).remove)
        yield


def checked_logits(output: Any) -> Tensor:
    """The output of a classifier (N, classes). Raises InputError if it is anything else."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError("the model's output is not a classifier's", found=found, expected="logits (N, classes)")
    return output


def counted(batches: Iterable[Batch]) -> int:
    """Images in all batches. Raises InputError if there are none."""
    count = sum(count_of(inputs) for inputs, _ in batches)
    if count == 0:
        raise InputError("curvature needs calibration images", found="none", expected="at least one")
    return count


def finite(curvature: dict[str, Tensor]) -> dict[str, Tensor]:
    """The argument. Raises InputError if a value is NaN or infinite; the message names the layer."""
    for name, value in curvature.items():
        if not bool(value.isfinite().all()):
            what = f"the curvature of layer {name!r} is not finite"
            raise InputError(what, found="NaN or infinity", do="check the model's weights and the images")
    return curvature
