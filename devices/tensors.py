"""Arrays as raw bytes, as the agent's frames carry them: little endian, each with its name, type and shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..pipeline.errors import DeviceError

Array = NDArray[Any]


def packed(arrays: Mapping[str, Array]) -> tuple[list[dict[str, Any]], bytes]:
    """(heads, bytes) of some arrays."""
    whole = {name: np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<")) for name, a in arrays.items()}
    heads = [{"name": n, "dtype": a.dtype.name, "shape": list(a.shape)} for n, a in whole.items()]
    return heads, b"".join(a.tobytes() for a in whole.values())


def unpacked(heads: Sequence[dict[str, Any]], data: bytes, board: str, model: str) -> dict[str, Array]:
    """Arrays by name out of raw bytes; `board` and `model` are for messages.

    Raises:
        DeviceError: there are fewer bytes, or more, than the shapes say.
    """
    kinds = [np.dtype(h["dtype"]).newbyteorder("<") for h in heads]
    sizes = [kind.itemsize * math.prod(h["shape"]) for kind, h in zip(kinds, heads, strict=True)]
    if sum(sizes) != len(data):
        raise DeviceError(
            f"board {board}: outputs of {model}",
            found=f"{len(data)} bytes",
            expected=f"{sum(sizes)} bytes",
            do="they were cut off; run the same command again",
        )
    tensors, start = {}, 0
    for head, kind, size in zip(heads, kinds, sizes, strict=True):
        tensors[str(head["name"])] = np.frombuffer(data[start : start + size], dtype=kind).reshape(head["shape"])
        start += size
    return tensors
