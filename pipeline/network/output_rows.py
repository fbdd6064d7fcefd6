"""Some rows of a convolution's output, evenly spaced, and the parts of its input that they read.

A layer's second moments and least squares are sums over output positions. Neighbours on a large map are much alike: at 224 pixels
a fiftieth of the positions tells as much as all of them, and all of them cost as much as many forward passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_POSITIONS = 256  # about so many output positions of a sample are taken


def rows_seen(height: int, width: int, turn: int, positions: int = MOST_POSITIONS) -> list[int]:
    """Returns which rows of an output (height, width) are taken: all, or evenly spaced ones with at least so many positions.

    At each turn (of the batches) they are others, so that in the end all are seen.
    """
    count = max(1, math.ceil(positions / width))
    if count >= height:
        return list(range(height))
    return sorted({(row * height // count + turn) % height for row in range(count)})


def strips(bordered: Tensor, rows: list[int], kernel: int, dilation: int, stride: int) -> Tensor:
    """Returns the parts of padded inputs (n, C, H, W) that some output rows read, as samples of their own.

    Their shape is (rows * n, C, h, W), row after row; a convolution without padding gives one output row for each.
    """
    span = dilation * (kernel - 1) + 1
    return torch.cat([bordered[:, :, row * stride : row * stride + span] for row in rows])


def rows_of(outputs: Tensor, rows: list[int]) -> Tensor:
    """Returns those rows of outputs (n, C, H, W), in the order of `strips`: (rows * n, C, W)."""
    return torch.cat([outputs[:, :, row] for row in rows])
