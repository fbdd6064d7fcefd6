"""Turns the dataclasses of `types` into JSON and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import StrEnum
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A JSON-serialisable copy of a tree of dataclasses, dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, StrEnum) else value


def from_json(cls: type[T], data: Any) -> T:
    """The inverse of `to_json`: `from_json(type(x), to_json(x)) == x`.

    Raises:
        TypeError, KeyError, ValueError: the data does not have the type's shape.
    """
    return typing.cast(T, _build(cls, data))


def _build(cls: Any, data: Any) -> Any:
    origin = typing.get_origin(cls)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(cls)
        if data is None and type(None) in options:
            return None
        return _build(next(o for o in options if o is not type(None)), data)
    if origin is tuple:
        args = typing.get_args(cls)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_build(args[0], v) for v in data)
        return tuple(_build(a, v) for a, v in zip(args, data, strict=True))
    if origin is dict:
        value_type = typing.get_args(cls)[1]
        return {str(k): _build(value_type, v) for k, v in data.items()}
    if dataclasses.is_dataclass(cls):
        if not isinstance(data, dict):
            raise TypeError(f"{getattr(cls, '__name__', cls)}: an object was expected, found {type(data).__name__}")
        hints = typing.get_type_hints(cls)
        return typing.cast(Any, cls)(**{k: _build(hints[k], v) for k, v in data.items()})
    if isinstance(cls, type) and issubclass(cls, StrEnum):
        return cls(data)
    if cls is float and isinstance(data, int):
        return float(data)
    return data
