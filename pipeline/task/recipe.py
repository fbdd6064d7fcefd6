"""A recipe: the user's own network, data, loss and metric, from a Python file or an object.

Only `model()` and `datasets()` are required. Everything in it is the user's code; what it raises or returns is checked here and
in `recipe_task.py`, and named by function.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..data.code_digest import code_digest, function_digest, is_users, module_of, source_of
from ..data.user_code import load_file, own_randomness, users_code
from ..errors import InputError
from ..network.calling import Outputs
from ..network.modes import unusable

SPLITS = ("train", "test", "search")
REQUIRED = ("model", "datasets")


@dataclass(frozen=True)
class Recipe:
    """What is to be compressed, and how it is judged. All but `model` and `datasets` have defaults.

    Args:
        model: gives the trained network, eval mode.
        datasets: gives {"train": D, "test": D} and perhaps "search": map-style datasets of (inputs, target), one sample each;
            inputs are a tensor, or a tuple or dict of tensors; a target is anything that can be collated, or None.
        outputs: of the raw result of `forward`, what is deployed: a tensor, or a tuple or dict of tensors. Default: all tensors.
        loss: (outputs, target) -> scalar. Default: the distance of every output to the dense network's.
        metric: gives an object with `update(outputs, target)`, `compute()`, `reset()`, and `name`, `unit`, `higher_is_better`.
            Default: agreement with the dense network.
        augment: (inputs, target) -> (inputs, target) of one sample, for training. Default: none.
        collate: samples -> (inputs, target) of a batch. Default: torch's.
        picture: (inputs, outputs, target) of one sample, a batch of one -> what is to be seen of them, uint8 (H, W, 3). The
            report shows it for the dense network and for the artifact. Default: none.
        name: what the network is called in the report.
    """

    model: Callable[[], nn.Module]
    datasets: Callable[[], Mapping[str, Any]]
    outputs: Callable[[Any], Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    metric: Callable[[], Any] | None = None
    augment: Callable[[Any, Any], tuple[Any, Any]] | None = None
    collate: Callable[[Sequence[Any]], tuple[Any, Any]] | None = None
    picture: Callable[[Any, Any, Any], Any] | None = None
    name: str = "recipe"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and value is not None and not callable(value):
                raise InputError(f"recipe {self.name}: {field.name}", found=type(value).__name__, expected="a function")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its functions, of the values they were given, and of the user's modules they are in and import.

        It is that of the moment it is first asked for, see `load.load_recipe`.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self) if callable(getattr(self, field.name))}
        functions = {name: function_digest(function) for name, function in given.items()}
        modules = {code_digest(module) for module in map(module_of, given.values()) if module is not None and _is_users(module)}
        return hashlib.sha256(json.dumps([functions, sorted(modules)]).encode()).hexdigest()

    @property
    def _file(self) -> Path | None:
        try:
            return Path(inspect.getsourcefile(inspect.unwrap(self.model)) or ".").resolve()
        except TypeError:  # an object with __call__, or a partial one
            return None

    @contextmanager
    def calling(self, function: str) -> Iterator[None]:
        """Whatever the user's code raises inside becomes an error that names the function; modules beside it can be imported."""
        folder = Path.cwd() if self._file is None else self._file.parent
        with users_code(folder, f"recipe {self.name}: {function}", do="call it on its own to see where"):
            yield

    def wrong(self, function: str, found: str, expected: str, do: str = "") -> InputError:
        """The error for a function that returns what cannot be used."""
        return InputError(f"recipe {self.name}: {function}", found=found, expected=expected, do=do)


def read_recipe(path: Path) -> Recipe:
    """The recipe that a Python file holds.

    Raises:
        InputError: no such file, it cannot be imported, or a required function is missing.
    """
    if not path.is_file():
        raise InputError(f"recipe {path}", found="no such file", expected="a Python file with model() and datasets()")
    module = load_file(path, "recipe")
    return recipe_of(module, path.name)


def recipe_of(module: ModuleType, name: str) -> Recipe:
    """The recipe in a module."""
    known = [field.name for field in fields(Recipe) if field.name != "name"]
    found = {key: getattr(module, key) for key in known if getattr(module, key, None) is not None}
    found = {key: value for key, value in found.items() if not isinstance(value, ModuleType)}
    for key in REQUIRED:
        if key not in found:
            raise InputError(
                f"recipe {name}", found=f"no function {key}()", expected="model() and datasets()", do=f"define {key}()"
            )
    return Recipe(**found, name=name)


def _is_users(module: ModuleType) -> bool:
    """Whether a module is the user's own; a loss or a metric may be of a library, which its version tells apart."""
    source = source_of(module)
    return source is not None and is_users(source)


def network_of(recipe: Recipe) -> nn.Module:
    """The network that `model()` gives, on the CPU, in float32 and eval mode, with its deployed outputs alone.

    It stays an instance of the user's class: its `forward` gives a tensor, or a tuple of tensors in order.

    Raises:
        InputError: `model()` fails, or gives no trained network in eval mode.
    """
    with recipe.calling("model()"), own_randomness():
        module = recipe.model()
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise recipe.wrong("model()", f"a {type(module).__name__}", "an nn.Module in Python", "return the trained network")
    found, do = unusable(module)
    if found:
        raise recipe.wrong("model()", found, "an nn.Module with values", do)
    if module.training:
        raise recipe.wrong("model()", "a network in training mode", "eval mode", "return it after .eval()")
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()):
        raise recipe.wrong("model()", "half-precision weights", "float32", "return it after .float()")
    with recipe.calling("model()"):
        return module.to("cpu")


class Structure:
    """How a network's deployed outputs are arranged for the user's loss and metric: a tensor, a tuple or a dict."""

    def __init__(self, names: tuple[str, ...], kind: str) -> None:
        self.names, self.kind = names, kind

    @classmethod
    def of(cls, value: Any) -> tuple[Structure, Outputs] | None:
        """The arrangement and the tensors of a result; None where it holds no tensor."""
        if isinstance(value, Tensor):
            return cls(("output",), "tensor"), (value,)
        found = _named(value)
        if not found:
            return None
        kind = "dict" if isinstance(value, Mapping) else "tuple"
        return cls(tuple(found), kind), tuple(found.values())

    def arranged(self, outputs: Outputs) -> Any:
        """Tensors in order, as the user's functions know them."""
        if self.kind == "tensor":
            return outputs[0]
        return dict(zip(self.names, outputs, strict=True)) if self.kind == "dict" else outputs


def deployed(module: nn.Module, outputs: Callable[[Any], Any] | None) -> nn.Module:
    """The network with a `forward` that gives its deployed tensors: one, or a tuple. It is of a class derived from the user's."""
    kind = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run: Callable[..., Any] = kind.forward
        raw = run(self, *args, **kwargs)
        found = Structure.of(raw if outputs is None else outputs(raw))
        assert found is not None  # checked when the recipe was loaded
        return found[1][0] if len(found[1]) == 1 else found[1]

    changed = copy.copy(module)
    changed.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "user_class": kind})
    return changed


def as_given(module: nn.Module) -> nn.Module:
    """The network as an instance of the user's own class again: its `forward` gives what it gave."""
    found = copy.copy(module)
    while kind := getattr(type(found), "user_class", None):
        found.__class__ = kind
    return found


def _named(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a nested result, by name, in order."""
    if isinstance(value, Tensor):
        return {prefix or "output": value}
    if isinstance(value, Mapping):
        pairs = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        pairs = [(f"output_{k}" if not prefix else str(k), item) for k, item in enumerate(value)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, item in pairs:
        found |= _named(item, f"{prefix}_{key}" if prefix else key)
    return found
