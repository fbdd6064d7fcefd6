"""A layer's inputs as columns, and the gradients of its weight image by image, squared and summed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..errors import InputError
from ..network.exact_mode import Layer
from ..network.row_sampling import input_strips

CACHED = 1 << 18  # elements of per-image gradients formed at a time on a CPU: they are squared before they leave its cache


def padded(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The inputs with the layer's own border: "same", reflected and circular ones come out as the layer sees them."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode)


def unfold(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What each output position reads: (n, C * kh * kw, positions)."""
    return F.unfold(padded(layer, inputs), layer.kernel_size, layer.dilation, 0, layer.stride)


def strip_columns(layer: nn.Conv2d, inputs: Tensor, rows: list[int]) -> Tensor:
    """Returns the unfolded inputs of output rows: (rows * n, C * kh * kw, W), see `network.row_sampling.input_strips`."""
    part = input_strips(padded(layer, inputs), rows, layer.kernel_size[0], layer.dilation[0], layer.stride[0])
    return F.unfold(part, layer.kernel_size, layer.dilation, 0, layer.stride)


def positions_last(layer: Layer, values: Tensor) -> Tensor:
    """A layer's outputs, or a linear layer's inputs, as (n, channels, positions).

    A convolution has its channels in dimension 1, a linear layer in the last: (n, C), (n, T, C), (n, H, W, C).
    """
    if isinstance(layer, nn.Linear):
        return values.reshape(len(values), -1, values.shape[-1]).transpose(1, 2)
    return values.flatten(2)


def unfolded(layer: Layer, inputs: Tensor, positions: int, name: str = "") -> Tensor:
    """A layer's inputs as columns (n, groups, k, L), so that `weight.view(groups, -1, k) @ columns` are its outputs, less bias.

    Args:
        layer: the layer.
        inputs: what its forward got: (n, C, H, W), or (n, ..., C) for Linear.
        positions: L, the positions of the output it gave.
        name: of the layer, for the error.

    Raises:
        InputError: the layer's padding does not give that many positions (a convolution with a forward of its own).
    """
    if isinstance(layer, nn.Linear):
        return positions_last(layer, inputs).unsqueeze(1)
    columns = unfold(layer, inputs)
    if columns.shape[2] != positions:
        what = f"layer {name!r} ({type(layer).__name__}) does not compute what its padding says"
        raise InputError(what, found=f"{positions} output positions", expected=str(columns.shape[2]), do="use a plain Conv2d")
    return columns.view(columns.shape[0], layer.groups, -1, positions)


def squared(name: str, layer: Layer, inputs: Tensor, gradient: Tensor, chunk: int) -> Tensor:
    """Sum over images of the squared gradient with respect to the layer's weight, in the weight's shape."""
    positions = positions_of(layer, gradient)
    if isinstance(layer, nn.Conv2d) and positions > 1 and not inputs.is_cuda:
        return _squared_by_groups(name, layer, inputs, gradient, min(chunk, CACHED))
    total = torch.zeros_like(layer.weight, requires_grad=False).flatten(1)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    for start, stop in parts(layer, inputs, gradient, chunk):
        u = unfolded(layer, inputs[start:stop], positions, name)  # (n, groups, k, L)
        g = gradient[start:stop]
        g = positions_last(layer, g).reshape(len(g), groups, -1, positions)  # (n, groups, O/groups, L)
        if positions == 1:  # (g u)^2 = g^2 u^2: one matrix product for all images
            squares = g.square().permute(1, 2, 0, 3).squeeze(3) @ u.square().permute(1, 0, 2, 3).squeeze(3)
        else:
            squares = (g @ u.transpose(2, 3)).square_().sum(0)
        total += squares.reshape(total.shape)
    return total.view_as(layer.weight)


def _squared_by_groups(name: str, layer: nn.Conv2d, inputs: Tensor, gradient: Tensor, chunk: int) -> Tensor:
    """The same by the convolution's own backward pass, with every image a group of channels: on a CPU unfolding costs more."""
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        padding, inputs = (0, 0), padded(layer, inputs)
    check_positions(name, layer, inputs, padding, gradient)
    total = torch.zeros_like(layer.weight, requires_grad=False)
    for x, g in zip(*(torch.split(t, max(1, chunk // total.numel())) for t in (inputs, gradient)), strict=True):
        found: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            x.reshape(1, -1, *x.shape[2:]),
            (len(x) * len(total), *total.shape[1:]),
            g.reshape(1, -1, *g.shape[2:]),
            layer.stride,
            padding,
            layer.dilation,
            len(x) * layer.groups,
        )
        total += found.view(len(x), *total.shape).square_().sum(0)
    return total


def check_positions(name: str, layer: nn.Conv2d, inputs: Tensor, padding: tuple[int, ...], output: Tensor) -> None:
    """Raises InputError where a layer's padding does not give the output's shape (a convolution with a forward of its own)."""
    sizes = zip(inputs.shape[2:], padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    expected = tuple(
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, pad, dilation, kernel, stride in sizes
    )
    if expected != tuple(output.shape[2:]):
        what = f"layer {name!r} ({type(layer).__name__}) does not compute what its padding says"
        raise InputError(what, found=f"output {tuple(output.shape[2:])}", expected=str(expected), do="use a plain Conv2d")


def positions_of(layer: Layer, output: Tensor) -> int:
    """Output positions per image, L."""
    return output[0].numel() // layer.weight.shape[0]


def parts(layer: Layer, inputs: Tensor, output: Tensor, chunk: int) -> Iterator[tuple[int, int]]:
    """Ranges of images whose unfolded inputs (and per-image gradients) stay under `chunk` elements."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    each = max(positions_of(layer, output) * groups * layer.weight[0].numel(), layer.weight.numel())
    count = max(1, chunk // each)
    return ((start, start + count) for start in range(0, len(inputs), count))
