"""Comparing what two networks answer."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..capture import Example

TOLERANCE = 1e-4  # of the range of the outputs: networks that differ by no more answer the same


def relative_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest absolute difference of any output, relative to that output's range."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        a, b = (t.detach().float() if t.dtype == torch.bool else t.detach() for t in (one, other))  # bool has no difference
        if not b.numel():
            continue
        same = (a == b) | (a.isnan() & b.isnan())  # such as the -inf of a mask
        finite = b[b.isfinite()]
        if finite.numel():  # an extreme that both have exactly may be the constant of a mask, far from all answers
            told = b[b.isfinite() & ~(same & ((b == finite.min()) | (b == finite.max())))]
            finite = told if told.numel() > 1 else finite
        span = float(finite.max() - finite.min()) if finite.numel() > 1 else 0.0
        span = span or (float(finite.abs().max()) if finite.numel() else 0.0) or 1.0
        difference = float(torch.where(same, 0.0, (a - b).abs()).max() / span)
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def cast(example: Example, dtype: torch.dtype | None) -> Example:
    """An example with its floating-point tensors in another type; None: as it is."""
    if dtype is None:
        return example
    example = copy.deepcopy(example)

    def to(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(dtype)
        if isinstance(value, list | tuple):
            return type(value)(to(v) for v in value)
        return {k: to(v) for k, v in value.items()} if isinstance(value, dict) else value

    return to(example[0]), to(example[1])
