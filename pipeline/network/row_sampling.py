"""Subsamples the rows of large feature maps for second moments and least squares, which are sums over output positions.

Neighbouring positions are correlated, and on all positions of a 224-pixel map these sums cost as much as many forward passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_POSITIONS = 256  # output positions of a sample, about


def sampled_rows(height: int, width: int, turn: int, positions: int = MOST_POSITIONS) -> list[int]:
    """Returns evenly spaced rows of a feature map (height, width) with at least so many positions; all rows of a small map.

    The rows are shifted by `turn`, the number of the batch, so that together the batches cover all rows.
    """
    count = max(1, math.ceil(positions / width))
    if count >= height:
        return list(range(height))
    return sorted({(row * height // count + turn) % height for row in range(count)})


def input_strips(bordered: Tensor, rows: list[int], kernel: int, dilation: int, stride: int) -> Tensor:
    """Returns the receptive fields of output rows in padded inputs (n, C, H, W), as samples (rows * n, C, h, W), row by row.

    A convolution without padding computes one output row of each.
    """
    span = dilation * (kernel - 1) + 1
    return torch.cat([bordered[:, :, row * stride : row * stride + span] for row in rows])


def output_strips(outputs: Tensor, rows: list[int]) -> Tensor:
    """Returns these rows of outputs (n, C, H, W) as (rows * n, C, W), in the order of `input_strips`."""
    return torch.cat([outputs[:, :, row] for row in rows])
