"""From stored pixels to network inputs, for all stages and runtimes. Imports no torch: artifacts are verified without it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...targets.base import Images, Target
from ..errors import InputError
from ..types import Preprocess


def artifact_images(target: Target, pixels: NDArray[np.uint8], prep: Preprocess) -> Images:
    """What a target's artifacts take of stored pixels (n, H, W, C): these, or network inputs (n, C, H, W)."""
    return pixels if target.takes_pixels else network_inputs(pixels, prep)


def network_inputs(pixels: NDArray[np.uint8], prep: Preprocess) -> NDArray[np.float32]:
    """Network inputs (n, C, H, W), `(pixel / 255 - mean) / std` in float32, of pixels (n, H, W, C).

    Raises:
        InputError: mean or std do not fit the channels.
    """
    n, height, width, channels = pixels.shape
    if len(prep.mean) != channels or len(prep.std) != channels:
        found = f"{len(prep.mean)} means and {len(prep.std)} deviations"
        raise InputError("mean and std", found=found, expected=f"{channels} of each, one per channel", do="set --mean and --std")
    mean, std = (np.array(values, np.float32)[:, None] for values in (prep.mean, prep.std))
    table = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std  # (C, 256): a pixel has no other values
    inputs = np.empty((n, channels, height, width), np.float32)
    for channel in range(channels):
        np.take(table[channel], pixels[..., channel], out=inputs[:, channel], mode="clip")  # "raise" would copy the output
    return inputs
