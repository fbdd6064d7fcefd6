"""Validates board replies against schemas before use.

A schema is a type (`int`: a count, at least 0), a list of one schema for any number of entries, a list of several for exactly
these, a dict with the key "*" for any keys, or a dict of named schemas. Additional keys are ignored, for newer agents.
"""

from __future__ import annotations

import math
from typing import Any

from ...pipeline.errors import printable

MOST_TEXT = 4096  # characters
MOST_ENTRIES = 1_000_000  # of a list
_NUMBER = (int, float)
_TEXTS = {"*": str}  # any keys
_MACHINE = dict.fromkeys(("cpu", "cpus", "machine", "board", "python", "governor", "load_average"), str)
_TENSOR = {"name": str, "dtype": str, "shape": [int]}
SCHEMAS: dict[str, Any] = {
    "hello": {
        "machine": _TEXTS | _MACHINE,
        "host": str,
        "boot_id": str,
        "power_mode": str,
        "emulated": bool,
        "runtimes": _TEXTS,
        "memory_total_bytes": int,
        "memory_available_bytes": int,
        "disk_free_bytes": int,
        "temperatures_c": {"*": _NUMBER},
        "clocks_mhz": {"*": [_NUMBER, _NUMBER, _NUMBER]},  # now, least, most
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
    "layers": {"layers": [[str, str, _NUMBER]]},  # operator, its kind, nanoseconds
}
REFUSAL = {"kind": str, "error": str}


def validated(schema: Any, value: Any) -> Any:
    """Returns the value if it matches the schema, with control characters in its strings escaped.

    Raises:
        ValueError: it does not match; a number is not finite, or a count is negative. The message names the field.
    """
    return _validated(schema, value, "it")


def _validated(schema: Any, value: Any, at: str) -> Any:
    if isinstance(schema, dict):
        if not isinstance(value, dict) or len(value) > MOST_ENTRIES:
            raise ValueError(f"{at} is {_kind(value)}, not a table")
        if missing := [key for key in schema if key not in value and key != "*"]:
            raise ValueError(f"{at} has no {missing[0]}")
        named = {key: schema.get(key, schema.get("*")) for key in value}
        names = {key: printable(str(key))[:MOST_TEXT] for key in value}
        known = {names[key]: _validated(named[key], value[key], names[key]) for key in value if named[key] is not None}
        return {names[key]: value[key] for key in value} | known
    if isinstance(schema, list):
        if not isinstance(value, list) or len(value) > MOST_ENTRIES:
            raise ValueError(f"{at} is {_kind(value)}, not a list")
        schemas = schema * len(value) if len(schema) == 1 else schema
        if len(value) != len(schemas):
            raise ValueError(f"{at} has {len(value)} entries, not {len(schemas)}")
        pairs = zip(schemas, value, strict=True)
        return [_validated(one, each, f"{at}[{number}]") for number, (one, each) in enumerate(pairs)]
    if not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool):
        raise ValueError(f"{at} is {_kind(value)}")
    if isinstance(value, str):
        if len(value) > MOST_TEXT:
            raise ValueError(f"{at} has {len(value)} characters")
        return printable(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{at} is too large a number")
    if schema is int and value < 0:
        raise ValueError(f"{at} is {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{at} is {value}")
    return value


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
