"""Frozen dataclasses to JSON and back. Reading is strict: data that do not have the type's shape are an error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from enum import StrEnum
from typing import Any, TypeVar

T = TypeVar("T")
MOST_JSON_BYTES = 64 << 20  # of a text from outside; a report has one or two million


def to_json(value: Any) -> Any:
    """A JSON-serialisable copy of a tree of dataclasses, dicts, lists and tuples."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, StrEnum) else value


def finite(value: Any) -> Any:
    """A copy of JSON data with null in place of NaN and the infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parsed(text: bytes, most: int = MOST_JSON_BYTES) -> Any:
    """Returns the data of a JSON text from outside; empty lists in it take thirty times as many bytes.

    Raises:
        ValueError: it is not JSON, has more than `most` bytes, or is nested too deep.
    """
    if len(text) > most:
        raise ValueError(f"{len(text)} bytes, at most {most} are read")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def require_durations(data: Any, at: str = "result") -> None:
    """Refuses JSON data in which a number under the key `seconds` is not a duration: below 0, infinite or NaN.

    Raises:
        ValueError: one is not.
    """
    if isinstance(data, list):
        for number, value in enumerate(data):
            require_durations(value, f"{at}[{number}]")
    elif isinstance(data, dict):
        for key, value in data.items():
            if key == "seconds" and isinstance(value, float) and not 0 <= value < math.inf:
                raise ValueError(f"{at}.{key}: {value}, which is not a duration")
            require_durations(value, f"{at}.{key}")


def json_sha256(value: object) -> str:
    """Returns the SHA-256, in hex, of JSON data, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()


def from_json(cls: type[T], data: Any) -> T:
    """The inverse of `to_json`: `from_json(type(x), to_json(x)) == x`.

    Raises:
        TypeError, KeyError, ValueError: the data do not have the type's shape.
    """
    return typing.cast(T, _build(cls, data, getattr(cls, "__name__", str(cls))))


def _build(cls: Any, data: Any, at: str) -> Any:
    """`data` as a `cls`; `at` names the place in error messages."""
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        return _build(next(o for o in args if o is not type(None)), data, at)
    if origin is tuple:
        _require(data, (list, tuple), at)
        kinds = [args[0]] * len(data) if len(args) == 2 and args[1] is Ellipsis else args
        if len(kinds) != len(data):
            raise ValueError(f"{at}: {len(kinds)} entries were expected, found {len(data)}")
        return tuple(_build(kind, v, f"{at}[{i}]") for i, (kind, v) in enumerate(zip(kinds, data, strict=True)))
    if origin is dict:
        _require(data, (dict,), at)
        return {str(k): _build(args[1], v, f"{at}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(cls):
        _require(data, (dict,), at)
        hints = typing.get_type_hints(cls)
        return typing.cast(Any, cls)(**{k: _build(hints[k], v, f"{at}.{k}") for k, v in data.items()})
    if cls is float:
        _require(data, (int, float), at)
        try:
            return float(data)
        except OverflowError as error:  # an integer of hundreds of digits
            raise ValueError(f"{at}: the number is too large") from error
    if cls in (int, str, bool):
        _require(data, (cls,), at)
    elif isinstance(cls, type) and issubclass(cls, StrEnum):
        return cls(data)
    return data


def _require(data: Any, kinds: tuple[type, ...], at: str) -> None:
    if not isinstance(data, kinds) or (isinstance(data, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{at}: {expected} was expected, found {type(data).__name__}")
