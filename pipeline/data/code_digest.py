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
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
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
    file = file_of(module)
    return Path(file).resolve() if file.endswith(".py") and Path(file).is_file() else None


def file_of(module: ModuleType) -> str:
    """A module's `__file__`, "" where it has none; a module that is to be imported when it is first used stays unimported."""
    try:
        file = object.__getattribute__(module, "__dict__").get("__file__")
    except AttributeError:  # an object put in place of a module
        return ""
    return file if isinstance(file, str) else ""


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
    # `from package import name` may import a function or class: its code is in the package, which is digested itself
    with suppress(ImportError, ValueError, AttributeError):
        if "." in name and parent is None:
            return []
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            return [Path(spec.origin)]
    return []


# --------------------------------------------------------------------------------------------------------- functions and values


def function_digest(function: Any) -> str:
    """Returns the SHA-256 of a function: its name, its source or byte code, and the values it was given when it was made."""
    found = Content()
    found.add(function)
    return found.hexdigest()


def module_of(function: Any) -> ModuleType | None:
    """The module that a function is defined in, or the class of an object that is called."""
    while isinstance(function, partial | MethodType):
        function = function.func if isinstance(function, partial) else function.__func__
    function = inspect.unwrap(function)
    kind = function if isinstance(function, FunctionType | type) else type(function)
    return sys.modules.get(kind.__module__)


class Content:
    """SHA-256 of nested values: tensors and arrays by type, shape and content, functions by source, objects by attributes."""

    def __init__(self) -> None:
        self.bytes = 0  # that were added
        self._hash = hashlib.sha256()
        self._code: set[int] = set()  # functions and classes that are in it

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return self._hash.hexdigest()

    def add(self, value: Any, depth: int = 0) -> None:
        """Add a value; what lies deeper than a few levels in objects of objects is left out."""
        kind = type(value)
        self._put(f"{kind.__module__}.{kind.__qualname__}".encode())
        if isinstance(value, Tensor):
            plain = (value if value.layout is torch.strided else value.to_dense()).detach().cpu().contiguous()
            self._put(f"{value.dtype}{tuple(value.shape)}".encode())
            self._put(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
        elif isinstance(value, np.ndarray | np.generic):
            array = np.ascontiguousarray(value)
            self._put(f"{array.dtype.str}{array.shape}".encode())
            self._put(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        elif isinstance(value, bytes | bytearray | memoryview):
            self._put(value)
        elif isinstance(value, ModuleType):
            self._put(value.__name__.encode())
        elif isinstance(value, FunctionType | MethodType | type | partial):
            self._function(value, depth)
        elif value is None or isinstance(value, bool | int | float | complex | str | BuiltinFunctionType):
            self._put(repr(value).encode())
        elif depth < _DEEPEST:
            self._parts(value, depth + 1)

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        size = memoryview(data).nbytes
        self._hash.update(size.to_bytes(8, "little"))
        self._hash.update(data)
        self.bytes += size

    def _parts(self, value: Any, depth: int) -> None:
        """Of a container its items, of another object its attributes, or how it prints itself."""
        if isinstance(value, dict):
            for pair in value.items():
                self.add(pair, depth)
        elif isinstance(value, list | tuple):
            self._put(str(len(value)).encode())
            for item in value:
                self.add(item, depth)
        elif isinstance(value, set | frozenset):
            self.add(sorted(map(repr, value)), depth)
        elif callable(getattr(value, "tobytes", None)):  # an image
            self._put(repr((getattr(value, "size", None), getattr(value, "mode", None))).encode())
            self._put(bytes(value.tobytes()))
        else:
            slots = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
            names = sorted(slots - {"__dict__", "__weakref__"})
            own = dict(getattr(value, "__dict__", {})) | {n: getattr(value, n) for n in names if hasattr(value, n)}
            if own:
                self.add(own, depth)
            elif " at 0x" not in (text := repr(value)):
                self._put(text.encode())
            if callable(value):
                self._function(type(value), depth)

    def _function(self, function: Any, depth: int) -> None:
        """A function or class by name, source and given values; where its module has no file, also what it calls there."""
        if id(function) in self._code or depth >= _DEEPEST:
            return
        self._code.add(id(function))
        if isinstance(function, partial | MethodType):
            inner = (function.func, function.args, function.keywords) if isinstance(function, partial) else function.__func__
            self.add(inner, depth + 1)
            if isinstance(function, MethodType):
                self.add(function.__self__, depth + 1)
            return
        self._put(f"{function.__module__}.{function.__qualname__}".encode())
        module = sys.modules.get(function.__module__)
        without_file = module is None or source_of(module) is None  # a notebook's
        try:
            self._put(inspect.getsource(function).encode())
        except (OSError, TypeError):
            if isinstance(function, FunctionType):
                self._put(_code(function.__code__))
        if isinstance(function, type):
            members = [part for part in vars(function).values() if isinstance(part, FunctionType)] if without_file else []
            for member in members:
                self._function(member, depth + 1)
            return
        self.add((function.__defaults__, function.__kwdefaults__), depth + 1)
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                self.add(cell.cell_contents, depth + 1)
        if (wrapped := getattr(function, "__wrapped__", None)) is not None:
            self.add(wrapped, depth + 1)
        if without_file:
            for name in sorted(_names(function.__code__) & function.__globals__.keys()):
                value = function.__globals__[name]
                if not isinstance(value, FunctionType | type) or value.__module__ == function.__module__:
                    self.add((name, value), depth + 1)


def _names(code: CodeType) -> set[str]:
    """The global names that a function's code and the functions inside it read."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _code(code: CodeType) -> bytes:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c).encode() for c in code.co_consts]
    return code.co_code + b"".join(constants) + " ".join(code.co_names).encode()
