"""Boards: one TOML file each, shipped in the folder `boards` or the user's own. The file's name is the board's name.

Keys: `targets` (a list: what can be built for it), `transport` (how it is reached), and where wanted

    class       boards alike, of which any will do: `--device class:NAME`
    address     for ssh a host of ~/.ssh/config, HOST or USER@HOST; for adb the serial number. A shipped template has none.
    runtime     what runs artifacts there        threads, affinity    of the measurement; affinity is a list of cpus
    memory_mib  of the board                     precisions           a list: what its arithmetic is fast in
    power_mode  the mode it must be in while it is measured; without it any mode will do, and which it was is recorded
    python      the interpreter there            folder               where files are kept there, below the home folder
    benchmark_model  TensorFlow Lite's program of that name on a phone without Python, which then does the timing: a path, or a
                name in `folder`
    emulated    true for a machine whose times mean nothing: they are never called measured
    notes       for people                       source               where these facts come from
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..pipeline.errors import InputError, UnavailableError

TRANSPORTS = ("local", "ssh", "adb")
PRECISIONS = ("fp32", "fp16", "int8")
T = TypeVar("T")

_HERE = Path(__file__).parent / "boards"


@dataclass(frozen=True)
class Board:
    """A device to measure on."""

    name: str
    targets: tuple[str, ...]
    transport: str
    runtime: str = "onnxruntime"
    threads: int = 1
    affinity: tuple[int, ...] | None = None
    class_: str = ""  # of boards alike; the key is `class`
    address: str = ""  # ssh: a host; adb: a serial number; empty in a template
    memory_mib: int = 0  # 0: not known
    precisions: tuple[str, ...] = ()
    power_mode: str = ""  # the one it must be in; empty: any, and recorded
    python: str = "python3"
    folder: str = ""  # empty: the transport's own choice
    benchmark_model: str = ""  # the program on a phone without Python: a path, or a name in `folder`
    emulated: bool = False
    notes: str = ""
    source: str = ""  # of these facts
    file: str = ""  # it was read from


def user_folder() -> Path:
    """The folder of a user's own boards, which win over shipped ones of the same name."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "edge-compress" / "devices"


def names() -> tuple[str, ...]:
    """Every known board, in order."""
    return tuple(sorted(_files()))


def load(name_or_path: str | Path) -> Board:
    """A board by name, or by the path of its TOML file.

    Raises:
        InputError: no such board or file; a file that is not TOML; an unknown or missing key; a value of the wrong type.
        UnavailableError: the board is reached in a way that is not known here.
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
            found="no way to use it here in this version",
            expected=" or ".join(TRANSPORTS),
            do=f"see {path}",
        )
    return board


def of_class(name: str) -> tuple[Board, ...]:
    """The boards of a class that have an address, in order of their names; two files with one address are one board.

    Raises:
        InputError: there is none, or a board's file is wrong.
    """
    known = [board for board in map(load, names()) if board.class_]
    found = {(b.transport, b.address): b for b in reversed(known) if b.class_ == name and b.address}
    if not found:
        classes = sorted({board.class_ for board in known if board.address})
        raise InputError(
            f"device class {name!r}",
            found="no board of it with an address",
            expected=f"one of {', '.join(classes)}" if classes else f'`class = "{name}"` in the files of some boards',
            do=f"their files are in {user_folder()}",
        )
    return tuple(sorted(found.values(), key=lambda board: board.name))


def _files() -> dict[str, Path]:
    """Board name -> file; a user's own come last, so they win."""
    return {p.stem: p for folder in (_HERE, user_folder()) for p in sorted(folder.glob("*.toml"))}


def _parse(path: Path) -> Board:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"board file {path}", found=f"not TOML: {error}") from error
    except OSError as error:
        raise InputError(f"board file {path}", found=error.strerror or str(error), expected="a readable file") from error
    for key in table:
        if key not in _KEYS:
            raise InputError(f"board file {path}: unknown key {key!r}", expected=f"one of {', '.join(_KEYS)}")
    affinity = _list(path, table, "affinity", int) if "affinity" in table else None
    threads = _value(path, table, "threads", int, 1)
    if threads < 1 or (affinity is not None and (not affinity or min(affinity) < 0)):
        raise InputError(
            f"board file {path}: threads, affinity", found=f"{threads}, {affinity}", expected="threads >= 1, cpus >= 0"
        )
    precisions = _list(path, table, "precisions", str) if "precisions" in table else ()
    if not set(precisions) <= set(PRECISIONS):
        raise InputError(f"board file {path}: precisions", found=str(list(precisions)), expected=f"of {', '.join(PRECISIONS)}")
    words = {key: _value(path, table, key, str, "") for key in _WORDS}
    for key, pattern in _WORDS.items():
        if words[key] and not re.fullmatch(pattern, words[key]):
            raise InputError(
                f"board file {path}: {key}", found=repr(words[key]), expected="letters, digits and . _ - as in a name"
            )
    return Board(
        name=path.stem,
        targets=_list(path, table, "targets", str),
        transport=_value(path, table, "transport", str),
        runtime=_value(path, table, "runtime", str, "onnxruntime"),
        threads=threads,
        affinity=affinity,
        memory_mib=_value(path, table, "memory_mib", int, 0),
        precisions=precisions,
        power_mode=_value(path, table, "power_mode", str, ""),
        emulated=_value(path, table, "emulated", bool, False),
        notes=_value(path, table, "notes", str, ""),
        source=_value(path, table, "source", str, ""),
        file=str(path),
        class_=words["class"],
        address=words["address"],
        python=words["python"] or "python3",
        folder=words["folder"],
        benchmark_model=words["benchmark_model"],
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


_NAMES: dict[type, str] = {str: "a text", int: "a whole number", bool: "true or false"}
_KEYS = tuple(f.name.rstrip("_") for f in fields(Board) if f.name not in ("name", "file"))
# they become arguments of ssh, adb and the board's shell: nothing that any of these could take for an option or a command
_WORDS = {
    "class": r"\w[\w.-]*",
    "address": r"(?!-)([\w.-]+@)?(?!-)[\w.:-]+",
    "python": r"[\w./][\w./-]*",
    "folder": r"[\w./][\w./-]*",
    "benchmark_model": r"[\w./][\w./-]*",
}
