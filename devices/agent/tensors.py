"""Arrays as the raw bytes of a frame: little endian, each with its name, type and shape. The host uses this file too.

numpy is imported where it is needed: the agent itself runs without it, its models' processes have it with the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class SizeError(Exception):
    """There are fewer bytes, or more, than the shapes say."""

    def __init__(self, expected: int, found: int) -> None:
        self.expected, self.found = expected, found
        super().__init__(f"{found} bytes, {expected} expected")


def packed(arrays: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bytes]:
    """(heads, bytes) of some arrays."""
    import numpy

    whole = {name: numpy.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<")) for name, a in arrays.items()}
    heads = [{"name": n, "dtype": a.dtype.name, "shape": list(a.shape)} for n, a in whole.items()]
    return heads, b"".join(a.tobytes() for a in whole.values())


def unpacked(heads: Sequence[dict[str, Any]], data: bytes) -> dict[str, Any]:
    """Arrays by name out of raw bytes.

    Raises:
        SizeError: they are not as many as the shapes say.
    """
    import numpy

    kinds = [numpy.dtype(h["dtype"]).newbyteorder("<") for h in heads]
    sizes = [kind.itemsize * math.prod(h["shape"]) for kind, h in zip(kinds, heads)]  # noqa: B905 - strict is newer than 3.8
    if sum(sizes) != len(data):
        raise SizeError(sum(sizes), len(data))
    tensors, start = {}, 0
    for head, kind, size in zip(heads, kinds, sizes):  # noqa: B905
        tensors[str(head["name"])] = numpy.frombuffer(data[start : start + size], dtype=kind).reshape(head["shape"])
        start += size
    return tensors
