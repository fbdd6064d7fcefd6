"""Boards: one TOML file each, shipped in the folder `boards` or the user's own. The file's name is the board's name.

The keys are the fields of `Board`; `targets` and `transport` must be there.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ..pipeline.errors import InputError, UnavailableError, shown
from ..pipeline.options import MOST_THREADS
from .folders import home_folder

TRANSPORTS = ("local", "ssh", "adb")
PRECISIONS = ("fp32", "fp16", "int8")

_HERE = Path(__file__).parent / "boards"


@dataclass(frozen=True)
class Board:
    """A device to measure on."""

    name: str
    targets: tuple[str, ...]  # what can be built for it
    transport: str  # how it is reached
    runtime: str = "onnxruntime"  # what runs artifacts there
    threads: int = 1  # of the measurement
    affinity: tuple[int, ...] | None = None  # cpus of the measurement
    class_: str = ""  # of boards alike, any of which will do: `--device class:NAME`; the key is `class`
    address: str = ""  # ssh: a host of ~/.ssh/config, HOST or USER@HOST; adb: the serial number; empty in a shipped template
    memory_mib: int = 0  # 0: not known
    precisions: tuple[str, ...] = ()  # what its arithmetic is fast in
    power_mode: str = ""  # the one it must be in while it is measured; empty: any, and it is recorded
    python: str = "python3"  # the interpreter there
    folder: str = ""  # where files are kept there, below the home folder; empty: the transport's own choice
    benchmark_model: str = ""  # TensorFlow Lite's program that times on a phone without Python: a path, or a name in `folder`
    emulated: bool = False  # its times mean nothing and are never called measured
    notes: str = ""  # for people
    source: str = ""  # of these facts
    file: str = ""  # it was read from; not a key


def user_folder() -> Path:
    """The folder of a user's own boards, which win over shipped ones of the same name."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if Path(base).is_absolute() else home_folder() / ".config") / "edge-compress" / "devices"


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
            expected = f"one of {', '.join(sorted(files))}, or a TOML file"
            raise InputError(f"device {text!r}", found="no such board", expected=expected)
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
    if path.exists() and not path.is_file():
        raise InputError(f"board file {path}", found="not a regular file", expected="a TOML file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, UnicodeDecodeError, numbers without end
        raise InputError(f"board file {path}", found=f"not TOML: {error}") from error
    except OSError as error:
        raise InputError(f"board file {path}", found=error.strerror or str(error), expected="a readable file") from error
    where = f"board file {path}"
    for key in table:
        if key not in _KEYS:
            raise InputError(f"{where}: unknown key {key!r}", expected=f"one of {', '.join(_KEYS)}")
    required: dict[str, Any] = dict.fromkeys(("targets", "transport"))
    values = {key: _checked(f"{where}: {key}", key, value) for key, value in (required | table).items()}
    for key, pattern in _WORDS.items():
        if values.get(key) and not re.fullmatch(pattern, values[key]):
            found = repr(values[key])
            raise InputError(f"{where}: {key}", found=found, expected="letters, digits and . _ - as in a name")
    values["python"] = values.get("python") or "python3"
    board = Board(path.stem, class_=values.pop("class", ""), file=str(path), **values)
    if not 1 <= board.threads <= MOST_THREADS or (board.affinity is not None and (not board.affinity or min(board.affinity) < 0)):
        found = f"{board.threads}, {board.affinity}"
        raise InputError(f"{where}: threads, affinity", found=found, expected=f"1 to {MOST_THREADS} threads, cpus >= 0")
    if board.memory_mib < 0:
        raise InputError(f"{where}: memory_mib", found=str(board.memory_mib), expected="0, for not known, or more")
    if not set(board.precisions) <= set(PRECISIONS):
        raise InputError(f"{where}: precisions", found=str(list(board.precisions)), expected=f"of {', '.join(PRECISIONS)}")
    return board


def _checked(where: str, key: str, value: Any) -> Any:
    """The value of a key, which is of the key's type; lists become tuples."""
    if key in _LISTS:
        kind = _LISTS[key]
        if not isinstance(value, list) or not all(_is(kind, v) for v in value):
            raise InputError(where, found=shown(value), expected=f"a list, each {_NAMES[kind]}")
        return tuple(value)
    kind = _KEYS[key]
    if not _is(kind, value):
        raise InputError(where, found=shown(value), expected=_NAMES[kind])
    return value


def _is(kind: type, value: object) -> bool:
    """Whether a value is of a type, and not too large to be computed with, sent to a board or printed."""
    return type(value) is kind and (not isinstance(value, int) or abs(value) < 1 << 31)


_NAMES: dict[type, str] = {str: "a text", int: "a whole number below 2^31", bool: "true or false"}
_LISTS: dict[str, type] = {"targets": str, "affinity": int, "precisions": str}
# key -> type of the value, that of the default
_KEYS = {f.name.rstrip("_"): type(f.default) if f.default is not MISSING else str for f in fields(Board)[1:-1]}
# they become arguments of ssh, adb and the board's shell: nothing that any of these could take for an option or a command
_WORDS = {
    "class": r"\w[\w.-]*",
    "address": r"(?!-)([\w.-]+@)?(?!-)[\w.:-]+",
    "python": r"[\w./][\w./-]*",
    "folder": r"[\w./][\w./-]*",
    "benchmark_model": r"[\w./][\w./-]*",
}
