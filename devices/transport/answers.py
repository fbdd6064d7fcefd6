"""What a board's answers must look like: the one place where they are looked at before anything relies on them.

A shape is a type (`int`: a count, at least 0), a list of one shape, a dict with the key "*" for any keys, or a dict of named
shapes, whose further keys are not looked at: a newer agent may say more.
"""

from __future__ import annotations

import math
from typing import Any

from ...pipeline.errors import printable

MOST_TEXT = 4096  # characters
MOST_ENTRIES = 1_000_000  # of a list
_NUMBER = (int, float)
_TEXTS = {"*": str}  # any keys
_TENSOR = {"name": str, "dtype": str, "shape": [int]}
SHAPES: dict[str, Any] = {
    "hello": {
        "machine": _TEXTS,
        "host": str,
        "boot_id": str,
        "power_mode": str,
        "emulated": bool,
        "runtimes": _TEXTS,
        "memory_total_bytes": int,
        "memory_available_bytes": int,
        "disk_free_bytes": int,
        "temperatures_c": {"*": _NUMBER},
        "clocks_mhz": {"*": [_NUMBER]},
    },
    "has": {"has": bool},
    "runtime": {"package": str, "version": str},
    "load": {"handle": int, "pid": int, "package": str, "version": str, "inputs": [{"name": str, "kind": str, "shape": list}]},
    "run": {"tensors": [_TENSOR]},
    "warm": {"k": [int], "seconds": _NUMBER},
    "pairs": {
        "wall_ns": [[_NUMBER]],
        "cpu_ns": [[_NUMBER]],
        "seconds": _NUMBER,
        "peak_rss_bytes": int,
        "temperatures_c": [[_NUMBER]],
        "frequencies_mhz": [[_NUMBER]],
    },
    "memory": {"peak_rss_bytes": int},
    "layers": {"layers": [list]},
}
REFUSAL = {"kind": str, "error": str}


def checked(shape: Any, value: Any) -> Any:
    """Returns a value of the given shape, its texts without control characters.

    Raises:
        ValueError: it has another shape, a number that is not finite, or a count below zero; the message names the place.
    """
    return _checked(shape, value, "it")


def _checked(shape: Any, value: Any, at: str) -> Any:
    if isinstance(shape, dict):
        if not isinstance(value, dict) or len(value) > MOST_ENTRIES:
            raise ValueError(f"{at} is {_kind(value)}, not a table")
        if missing := [key for key in shape if key not in value and key != "*"]:
            raise ValueError(f"{at} has no {missing[0]}")
        shapes = {key: shape.get(key, shape.get("*")) for key in value}
        names = {key: printable(str(key))[:MOST_TEXT] for key in value}
        return {
            names[key]: each if shapes[key] is None else _checked(shapes[key], each, names[key]) for key, each in value.items()
        }
    if isinstance(shape, list):
        if not isinstance(value, list) or len(value) > MOST_ENTRIES:
            raise ValueError(f"{at} is {_kind(value)}, not a list")
        return [_checked(shape[0], each, f"{at}[{number}]") for number, each in enumerate(value)]
    if not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        raise ValueError(f"{at} is {_kind(value)}")
    if isinstance(value, str):
        if len(value) > MOST_TEXT:
            raise ValueError(f"{at} has {len(value)} characters")
        return printable(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{at} is too large a number")
    if shape is int and value < 0:
        raise ValueError(f"{at} is {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} is {value}")
    return value


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
