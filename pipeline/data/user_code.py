"""Runs the user's own Python: factories of networks and data sets."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import InputError, described
from .code_digest import EXECUTED, digest_of_file, executed, file_of, is_users, source_of

_NAMED = (ast.FunctionDef, ast.ClassDef)
_IMPORT = "make `import {}` work"


@dataclass(frozen=True)
class UserFactory:
    """A function of the user's and the module that defines it."""

    name: str  # "net.py:factory"
    function: Callable[..., Any]
    module: ModuleType


def located(place: str, what: str) -> Path:
    """Returns the path that a text names, with `~` and `~user` replaced by the folder they stand for.

    Raises:
        InputError: the user is unknown; `what` begins the message.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        found, expected = repr(place), "the home folder of a user of this machine"
        raise InputError(what, found=found, expected=expected, do="check the path") from error


def user_factory(spec: str, what: str) -> UserFactory:
    """Returns the function that `FILE.py:FUNCTION` or `package.module:FUNCTION` names.

    A file is run under a private module name; it can import the modules beside it. `what` ("model", "data") is for messages.

    Raises:
        InputError: no such file, module or function, or its code raises.
    """
    place, _, attribute = spec.rpartition(":")
    path = located(place, f"{what} {spec}")
    is_file = place.endswith(".py")
    if is_file and not path.is_file():
        raise InputError(f"{what} {spec}", found="no such file", expected="a Python file", do="check the path")
    module = load_file(path, what, spec) if is_file else _imported(place, what, spec)
    function = getattr(module, attribute, None)
    if not callable(function) or isinstance(function, nn.Module):
        found = f"no {attribute!r}" if function is None else f"{attribute!r}, a {type(function).__name__}"
        near = difflib.get_close_matches(attribute, [n for n, v in vars(module).items() if inspect.isroutine(v)], 1)
        do = f"did you mean {near[0]!r}?" if near else f"define `def {attribute}(): return ...`"
        raise InputError(f"{what} {spec}", found=found, expected="a function", do=do)
    return UserFactory(f"{path.name}:{attribute}" if is_file else spec, function, module)


def functions_in(place: str, argument: str = "") -> tuple[str, ...]:
    """Returns the public functions and classes of a file that need no argument, or none but `argument`, as the file has them.

    The file is parsed, not run; a file that cannot be parsed has none.
    """
    try:
        body = ast.parse(located(place, place).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return ()
    return tuple(node.name for node in body if isinstance(node, _NAMED) and node.name[:1] != "_" and _free(node, argument))


def _free(node: ast.FunctionDef | ast.ClassDef, argument: str) -> bool:
    """Whether it can be called without arguments, or with `argument` alone; a class without an initialiser counts as free."""
    if isinstance(node, ast.ClassDef):
        own = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return not own or _needed(own[0])[1:] in ([], [argument])
    return _needed(node) in ([], [argument])


def _needed(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    places = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    by_name = [a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None]
    return places[: len(places) - len(arguments.defaults)] + by_name


def load_file(path: Path, what: str, spec: str = "") -> ModuleType:
    """The module that a Python file is; it can import the modules beside it. `what` is for messages.

    Raises:
        InputError: its code raises.
    """
    folder = path.resolve().parent
    _forget_stale(folder)
    with users_code(folder, f"{what} {spec or path}: cannot be imported", do=_IMPORT.format(path.stem)):
        return _run_file(path)


def _imported(place: str, what: str, spec: str) -> ModuleType:
    _forget_stale(Path.cwd())
    with users_code(Path.cwd(), f"{what} {spec}: cannot be imported", do=_IMPORT.format(place)):
        return importlib.import_module(place)


def _run_file(path: Path) -> ModuleType:
    source = path.resolve()
    name = "_edge_compress_user_" + hashlib.sha256(bytes(source) + source.read_bytes()).hexdigest()[:16]
    if name in sys.modules:  # run before: once for the image size, once for the network
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, source)
    if found is None or found.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up while the file runs
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_LOADED: dict[str, Path] = {}  # the modules that the user's code imported here, and their files


def _forget_stale(folder: Path) -> None:
    """Makes code that is loaded next as it is on the disk now: what was imported from files changed since is forgotten.

    Modules imported from another folder do not stand for those of the same name in this one.
    """
    if any(digest_of_file(file) != executed(file) for file in _LOADED.values()):
        stale = list(_LOADED)
    else:
        own = {name for name, file in _LOADED.items() if "." not in name and _shadowed(name, file, folder.resolve())}
        stale = [name for name in _LOADED if name.partition(".")[0] in own]
    for name in stale:
        sys.modules.pop(name, None)
        file = _LOADED.pop(name)
        EXECUTED.pop(file, None)
        # Python takes byte code for current if the source's second and size are. There may be none to
        # remove: the folder was read-only (OSError), or this Python writes no byte code (NotImplementedError)
        with suppress(OSError, NotImplementedError):
            Path(importlib.util.cache_from_source(str(file))).unlink()
    importlib.invalidate_caches()
    places = (f"{folder.absolute()}{os.sep}", f"{folder.resolve()}{os.sep}")
    for name, module in list(sys.modules.items()):  # what the user imported himself is told apart by what it was, too
        if name not in _LOADED and file_of(module).startswith(places):  # before `source_of`, which looks on the disk
            source = source_of(module)
            if source is not None and is_users(source):
                EXECUTED.setdefault(source, digest_of_file(source))


@contextmanager
def _imports_noted() -> Iterator[None]:
    """Modules of the user's that are imported inside are known as such."""
    count = len(sys.modules)
    try:
        yield
    finally:
        for name in list(sys.modules)[count:] if len(sys.modules) > count else ():  # this runs for every sample: new ones alone
            file = source_of(sys.modules[name])
            if file is not None and is_users(file):
                EXECUTED.setdefault(file, digest_of_file(file))
                _LOADED[name] = file


def _shadowed(name: str, file: Path, folder: Path) -> bool:
    """Whether a folder has a module of this name other than the one from a file."""
    return any(place.is_file() and place.resolve() != file for place in (folder / f"{name}.py", folder / name / "__init__.py"))


@contextmanager
def users_code(folder: Path, what: str, *, expected: str = "", do: str = "") -> Iterator[None]:
    """Runs code of the user's, which can import the modules in `folder`; what it raises becomes an error that begins with `what`.

    `os._exit` would end the run without a message and raises SystemExit inside. PyTorch's default dtype, device, grad mode and
    number of threads are restored.

    Raises:
        InputError: the code raised anything but an InputError or KeyboardInterrupt.
    """
    try:
        with _importable(folder), _imports_noted(), _leave_taken(), _settings_restored(), _streams_reopened():
            yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # GeneratorExit and the like too: nothing of the user's ends the process
        raise InputError(what, found=described(error), expected=expected, do=do) from error


@contextmanager
def _settings_restored() -> Iterator[None]:
    dtype, device, threads = torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:  # None: or every call passes through a mode that sets the device
            torch.set_default_device(None if device.type == "cpu" else device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def _streams_reopened() -> Iterator[None]:
    """Opens standard streams that were closed inside again: Python leaves their descriptors open."""
    try:
        yield
    finally:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            if getattr(getattr(sys, name), "closed", False):
                setattr(sys, name, open(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115


@contextmanager
def _leave_taken() -> Iterator[None]:
    leave, process = os._exit, os.getpid()

    def told(status: int) -> NoReturn:
        if os.getpid() != process:  # a child that was forked ends so
            leave(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = told
    try:
        yield
    finally:
        os._exit = leave


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.append(str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code took it out itself
            sys.path.remove(str(folder))


@contextmanager
def own_randomness(seed: int = 0) -> Iterator[None]:
    """Makes initial weights independent of the process's random state, and leaves that as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
