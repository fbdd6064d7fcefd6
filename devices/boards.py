"""Boards: one TOML file each, shipped in this folder or the user's own. The file's name is the board's name.

Keys: `targets` (a list: what can be built for it), `transport` (how it is reached), and where wanted `runtime` (the
worker's name for what runs there), `threads`, `affinity` (a list: the cpus to measure on) and `notes`.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..pipeline.errors import InputError, UnavailableError

TRANSPORTS = ("local",)
T = TypeVar("T")

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Board:
    """A device to measure on."""

    name: str
    targets: tuple[str, ...]
    transport: str
    runtime: str = "onnxruntime"
    threads: int = 1
    affinity: tuple[int, ...] | None = None
    notes: str = ""
    source: str = ""  # the file it was read from


def user_folder() -> Path:
    """Where a user's own boards lie; they win over shipped ones of the same name."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "edge-compress" / "devices"


def names() -> tuple[str, ...]:
    """Every known board, in order."""
    return tuple(sorted(_files()))


def load(name_or_path: str | Path) -> Board:
    """A board by name, or by the path of its TOML file.

    Raises:
        InputError: no such board or file; a file that is no TOML; an unknown or missing key; a value of the wrong type.
        UnavailableError: the board is reached in a way this version cannot.
    """
    text = str(name_or_path)
    if text.endswith(".toml") or os.sep in text:
        path = Path(text)
        if not path.is_file():
            raise InputError(f"board file {text}", found="no such file", expected="a TOML file")
    else:
        files = _files()
        if text not in files:
            raise InputError(
                f"device {text!r}", found="no such board", expected=f"one of {', '.join(sorted(files))}, or a TOML file"
            )
        path = files[text]
    board = _parse(path)
    if board.transport not in TRANSPORTS:
        raise UnavailableError(
            f"board {board.name}: transport {board.transport!r}",
            found="no way to reach it in this version",
            expected=" or ".join(TRANSPORTS),
            do=f"see {path}",
        )
    return board


def _files() -> dict[str, Path]:
    """Board name -> file; a user's own come last, so they win."""
    return {p.stem: p for folder in (_HERE, user_folder()) for p in sorted(folder.glob("*.toml"))}


def _parse(path: Path) -> Board:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"board file {path}", found=f"no TOML: {error}") from error
    except OSError as error:
        raise InputError(f"board file {path}", found=error.strerror or str(error), expected="a readable file") from error
    known = ("targets", "transport", "runtime", "threads", "affinity", "notes")
    for key in table:
        if key not in known:
            raise InputError(f"board file {path}: unknown key {key!r}", expected=f"one of {', '.join(known)}")
    affinity = _list(path, table, "affinity", int) if "affinity" in table else None
    threads = _value(path, table, "threads", int, 1)
    if threads < 1 or (affinity is not None and (not affinity or min(affinity) < 0)):
        raise InputError(
            f"board file {path}: threads, affinity", found=f"{threads}, {affinity}", expected="threads >= 1, cpus >= 0"
        )
    return Board(
        name=path.stem,
        targets=_list(path, table, "targets", str),
        transport=_value(path, table, "transport", str),
        runtime=_value(path, table, "runtime", str, "onnxruntime"),
        threads=threads,
        affinity=affinity,
        notes=_value(path, table, "notes", str, ""),
        source=str(path),
    )


def _value(path: Path, table: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    value = table.get(key, default)
    if type(value) is not kind:
        raise InputError(f"board file {path}: {key}", found=repr(value), expected=_NAMES[kind])
    return value


def _list(path: Path, table: dict[str, Any], key: str, kind: type[T]) -> tuple[T, ...]:
    value = table.get(key)
    if not isinstance(value, list) or any(type(v) is not kind for v in value):
        raise InputError(f"board file {path}: {key}", found=repr(value), expected=f"a list, each {_NAMES[kind]}")
    return tuple(value)


_NAMES: dict[type, str] = {str: "a text", int: "a whole number"}
