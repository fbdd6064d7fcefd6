"""What the user's own code is told apart by: the files it is in, its functions, and the values they were given."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROOT = Path(__file__).resolve().parents[2]
_NOT_THE_USERS = (
    *(_ROOT / part for part in ("pipeline", "targets", "calibration", "devices")),
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
EXECUTED: dict[Path, bytes] = {}  # digests of source files of the user's as they were when this process imported them
_DEEPEST = 6  # of values that a function was given


def code_digest(module: ModuleType) -> str:
    """Returns the SHA-256 of a module's source and of the user's modules it imports, transitively; "" where it has no source.

    Installed packages are told apart by their versions, and are left out; the package the module itself is in is not.
    """
    first = source_of(module)
    if first is None:
        return ""
    top = sys.modules.get(module.__name__.partition(".")[0])
    home = Path(top.__path__[0]).resolve() if top is not None and getattr(top, "__path__", None) else None
    digest, found, waiting = hashlib.sha256(), {first: ""}, [first]
    while waiting:
        for name, file in _imports(waiting.pop(), first.parent):
            if file not in found and (is_users(file) or (home is not None and file.is_relative_to(home))):
                found[file] = name
                waiting.append(file)
    for name, content in sorted((name, executed(file)) for file, name in found.items()):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def source_of(module: ModuleType) -> Path | None:
    """The Python file a module was loaded from, if there is one."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py") or not Path(file).is_file():
        return None
    return Path(file).resolve()


def executed(file: Path) -> bytes:
    """The SHA-256 of a source file as it was imported; as it is now where it was not imported yet."""
    return EXECUTED.get(file) or digest_of_file(file)


def digest_of_file(file: Path) -> bytes:
    """The SHA-256 of a file; empty where it is gone."""
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b""


def is_users(file: Path) -> bool:
    """Whether a source file is neither of Python, nor installed, nor of this package."""
    inside = any(file.is_relative_to(folder) for folder in _NOT_THE_USERS)
    return not inside and not {"site-packages", "dist-packages"} & set(file.parts)


def _imports(path: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The names and files of the modules that a source file imports; `folder` is where it looks for them first."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name)
                yield from _files(alias.name, folder)
        elif isinstance(node, ast.ImportFrom):
            for dotted in (".".join(filter(None, (node.module, alias.name))) for alias in node.names):
                if 0 < node.level <= len(path.parents):
                    yield from _files(dotted, path.parents[node.level - 1])
                elif not node.level:
                    yield from _files(dotted)
                    yield from _files(dotted, folder)


def _files(dotted: str, folder: Path | None = None) -> Iterator[tuple[str, Path]]:
    """The files of a module and of the packages it is in: as they were loaded, else as they lie below a folder."""
    parts = dotted.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        if folder is not None:
            place = folder.joinpath(*parts[:end])
            files = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
        elif (loaded := sys.modules.get(name)) is not None:
            files = [file for file in (source_of(loaded),) if file is not None]
        else:
            files = _found(name, sys.modules.get(name.rpartition(".")[0]))
        for file in files:
            yield name, file.resolve()


def _found(name: str, parent: ModuleType | None) -> list[Path]:
    """Where a module that was not loaded yet would be loaded from."""
    with suppress(ImportError, ValueError, AttributeError):  # a name that is no module
        if "." in name and parent is None:
            return []
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            return [Path(spec.origin)]
    return []


# ------------------------------------------------------------------------------------------------------------------ functions


def function_digest(function: Any) -> str:
    """Returns the SHA-256 of a function: its name, its source or byte code, and the values it was given when it was made."""
    found = hashlib.sha256()
    for part in _function(function, set()):
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def module_of(function: Any) -> ModuleType | None:
    """The module that a function is defined in, or the class of an object that is called."""
    while isinstance(function, partial | MethodType):
        function = function.func if isinstance(function, partial) else function.__func__
    function = inspect.unwrap(function)
    kind = function if isinstance(function, FunctionType | type) else type(function)
    return sys.modules.get(kind.__module__)


def _function(function: Any, seen: set[int]) -> Iterator[bytes]:
    """A function's name, source and given values; where its module has no file, also those of what it calls there."""
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, partial):
        yield b"partial" + content_of([function.args, function.keywords])
        yield from _function(function.func, seen)
        return
    if isinstance(function, MethodType):
        yield content_of(getattr(function.__self__, "__dict__", {}))
        yield from _function(function.__func__, seen)
        return
    function = inspect.unwrap(function) if callable(function) else function
    kind = function if isinstance(function, FunctionType | type) else type(function)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if kind is not function:  # an object that is called
        yield content_of(getattr(function, "__dict__", {}))
    try:
        yield inspect.getsource(kind).encode()
    except (OSError, TypeError):
        yield _code(kind.__code__) if isinstance(kind, FunctionType) else b""
    if isinstance(kind, FunctionType):
        with suppress(ValueError):  # a cell that is not filled yet
            yield content_of([kind.__defaults__, kind.__kwdefaults__])
            yield content_of([cell.cell_contents for cell in kind.__closure__ or ()])
        module = sys.modules.get(kind.__module__)
        if module is None or source_of(module) is None:  # a notebook's
            for name in sorted(_names(kind.__code__)):
                value = kind.__globals__.get(name)
                if isinstance(value, FunctionType | type) and value.__module__ == kind.__module__:
                    yield from _function(value, seen)
                elif isinstance(value, int | float | str | bytes | bool | tuple | list | dict | Tensor | np.ndarray):
                    yield name.encode() + content_of(value)


def _names(code: CodeType) -> set[str]:
    """The global names that a function's code and the functions inside it read."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _code(code: CodeType) -> bytes:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c).encode() for c in code.co_consts]
    return code.co_code + b"".join(constants) + " ".join(code.co_names).encode()


def content_of(value: Any, depth: int = 0) -> bytes:
    """Returns bytes that tell nested values apart: tensors and arrays by type, shape and content, objects by their attributes."""
    kind = type(value)
    head = f"{kind.__module__}.{kind.__qualname__}".encode()
    if isinstance(value, Tensor):
        plain = (value if value.layout is torch.strided else value.to_dense()).detach().cpu().contiguous()
        return head + f"{value.dtype}{tuple(value.shape)}".encode() + _raw(plain)
    if isinstance(value, np.ndarray | np.generic):
        array = np.ascontiguousarray(value)
        body = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        return head + f"{array.dtype.str}{array.shape}".encode() + body
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return head + repr(value).encode()
    if depth >= _DEEPEST:
        return head
    if isinstance(value, dict):
        return head + b"".join(content_of(part, depth + 1) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return head + str(len(value)).encode() + b"".join(content_of(item, depth + 1) for item in value)
    if isinstance(value, set | frozenset):
        return head + b"".join(sorted(content_of(item, depth + 1) for item in value))
    if isinstance(value, FunctionType | MethodType | partial):
        return head + function_digest(value).encode()
    if callable(getattr(value, "tobytes", None)):  # an image
        return head + content_of([getattr(value, "size", None), getattr(value, "mode", None)], depth + 1) + bytes(value.tobytes())
    return head + content_of(getattr(value, "__dict__", {}), depth + 1)


def _raw(tensor: Tensor) -> bytes:
    """A tensor's memory; numpy does not know all of its types."""
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
