"""Which connections stay: masks of the patterns `weight` and `2:4` from scores.

A mask is a bool tensor of the weight's shape, True = stays. What scores lowest goes; of equal scores the one with the lower
index goes first (index in `flatten()`, layers in the order they are given), so counts are exact and the same scores give the
same mask on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError


def removed_count(total: int, sparsity: float) -> int:
    """How many of `total` go at this sparsity: the nearest whole number, halves upwards.

    Raises:
        InputError: the sparsity is not between 0 and 1.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise InputError("sparsity", found=str(sparsity), expected="0 to 1: the share of connections to remove")
    return math.floor(sparsity * total + 0.5)


def weight_masks(scores: Mapping[str, Tensor], sparsity: float | Mapping[str, float]) -> dict[str, Tensor]:
    """Masks of the pattern `weight`.

    Args:
        scores: layer name -> score of the weight's shape.
        sparsity: one number: this share of all connections goes, wherever the lowest scores are. A mapping layer name -> share:
            each layer loses its own; a layer not named keeps everything.

    Returns:
        Layer name -> mask. Exactly `removed_count` entries are False: over all layers, or in each.

    Raises:
        InputError: a share outside [0, 1], an unknown layer, or a score that is NaN.
    """
    if isinstance(sparsity, Mapping):
        _known(scores, sparsity)
        return {name: _highest(value, sparsity.get(name, 0.0), name) for name, value in scores.items()}
    if not scores:
        return {}
    joined = torch.cat([value.detach().flatten() for value in scores.values()])
    parts = torch.split(_highest(joined, sparsity, "all layers"), [value.numel() for value in scores.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(scores.items(), parts, strict=True)}


def two_four_fits(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape (O, C, ...) can carry 2:4: its inputs (per group) come in fours.

    A network's first convolution (C = 3) and depthwise convolutions (C = 1) cannot.
    """
    return len(shape) >= 2 and shape[1] > 0 and shape[1] % 4 == 0


def two_four_mask(scores: Tensor) -> Tensor:
    """Mask of one layer in the pattern 2:4: the two highest scores of every four consecutive inputs stay.

    The fours run along the *input channels*, for each output channel and kernel position on its own (KRSC order, as the sparse
    tensor cores read a convolution; TensorRT, "structured sparsity"), not along `flatten(1)`.

    Args:
        scores: (O, C) or (O, C, kh, kw).

    Raises:
        InputError: C is not a multiple of 4, or a score is NaN.
    """
    if not two_four_fits(tuple(scores.shape)):
        raise InputError("the pattern 2:4", found=f"a weight of shape {tuple(scores.shape)}", expected="a multiple of 4 inputs")
    _no_nan(scores, "the layer")
    fours = _fours(scores)
    order = fours.argsort(dim=2, stable=True)  # rising: the first two go
    mask = torch.ones_like(fours, dtype=torch.bool).scatter_(2, order[:, :, :2], value=False)
    return mask.flatten(1, 2)


def _fours(weight: Tensor) -> Tensor:
    """(O, C, ...) as (O, C/4, 4, ...)."""
    return weight.detach().reshape(weight.shape[0], -1, 4, *weight.shape[2:])


def _highest(scores: Tensor, sparsity: float, name: str) -> Tensor:
    """Mask of all but the lowest. By selection, not by sorting: ResNet-50 has 25 million connections."""
    _no_nan(scores, name)
    flat = scores.detach().flatten()
    count = removed_count(flat.numel(), sparsity)
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    edge = flat.kthvalue(count).values
    lower, equal = flat < edge, flat == edge
    # Of those at the edge, the first go until the count is met.
    gone = lower | (equal & (equal.cumsum(0) <= count - lower.sum()))
    return (~gone).view(scores.shape)


def _known(scores: Mapping[str, Tensor], sparsity: Mapping[str, float]) -> None:
    for name in sparsity:
        if name not in scores:
            raise InputError(f"sparsity of layer {name!r}", found="no such layer", expected=f"one of {', '.join(scores)}")


def _no_nan(scores: Tensor, name: str) -> None:
    if bool(scores.isnan().any()):
        raise InputError(f"scores of {name}", found="NaN", expected="numbers", do="check the model's weights and the images")
