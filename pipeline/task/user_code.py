"""Runs the user's own Python: factories of networks and of data."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import InputError


@dataclass(frozen=True)
class UserFactory:
    """A function of the user's and the module it stands in."""

    name: str  # "net.py:factory"
    function: Callable[..., Any]
    module: ModuleType


def user_factory(spec: str, what: str) -> UserFactory:
    """The function that `FILE.py:FUNCTION` or `package.module:FUNCTION` names.

    A file is run under a private module name of its own; what lies beside it can be imported while it is.

    Args:
        spec: where the function is.
        what: "model" or "data", for the message.

    Raises:
        InputError: no such file, module or function, or its code raises.
    """
    place, _, attribute = spec.rpartition(":")
    path = Path(place).expanduser()
    is_file = place.endswith(".py")
    if is_file and not path.is_file():
        raise InputError(f"{what} {spec}", found="no such file", expected="a Python file", do="check the path")
    try:
        with _importable(path.resolve().parent if is_file else Path.cwd()):
            module = _run_file(path) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{what} {spec}: cannot be imported", found=found, do=f"make `import {path.stem}` work") from error
    function = getattr(module, attribute, None)
    if not callable(function) or isinstance(function, nn.Module):
        found = f"no {attribute!r}" if function is None else f"{attribute!r}, a {type(function).__name__}"
        near = difflib.get_close_matches(attribute, [n for n, v in vars(module).items() if inspect.isroutine(v)], 1)
        do = f"did you mean {near[0]!r}?" if near else f"define `def {attribute}(): return ...`"
        raise InputError(f"{what} {spec}", found=found, expected="a function that makes it", do=do)
    return UserFactory(f"{path.name}:{attribute}" if is_file else spec, function, module)


def _run_file(path: Path) -> ModuleType:
    source = path.resolve()
    name = "_edge_compress_user_" + hashlib.sha256(bytes(source) + source.read_bytes()).hexdigest()[:16]
    if name in sys.modules:  # the same text was run before: once for the image size, once for the network
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


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`folder` as the last place where imports are looked for, as if the file was run from there."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Initial weights do not depend on, nor disturb, the process's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
