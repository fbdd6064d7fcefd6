"""Sizes that a `forward` holds itself: literals, and attributes no rule knows, corrected where they are used.

A module's calls of shape-taking functions come in the same order at every run. `record` notes them on the full network and
finds for each the operator of the captured graph it became, so that the labels tell which of its sizes follow the units.
`correct` makes a module's class one derived from the user's, whose `forward` runs the user's with those sizes replaced; all
others, such as the batch's, stay as the user computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from ..algebra import Axis
from ..capture import Captured, operator_name
from ..walk import Axes, number

if TYPE_CHECKING:
    from ..coupling import Coupling

_RESHAPES: dict[Any, str] = {
    torch.Tensor.view: "view", torch.Tensor.reshape: "reshape", torch.reshape: "reshape",
    torch.Tensor.unflatten: "unflatten", torch.unflatten: "unflatten",
    torch.Tensor.expand: "expand",
    torch.Tensor.split: "split", torch.split: "split", torch.functional.split: "split",
    torch.Tensor.split_with_sizes: "split", torch.split_with_sizes: "split",
}  # fmt: skip
_NODES = {"view": {"view"}, "reshape": {"reshape", "view"}, "unflatten": {"unflatten"}, "expand": {"expand"},
          "split": {"split", "split_with_sizes"}}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One shape-taking call: which function, and the axes of its result or results."""

    function: str
    axes: tuple[Axes, ...]
    dim: int = 0  # of a split


@dataclass(frozen=True)
class SizedCalls:
    """The shape-taking calls of one module's forward, in order."""

    calls: tuple[Call | None, ...]

    def under(self, coupling: Coupling, gone: NDArray[np.bool_]) -> tuple[tuple[str, tuple[int | None, ...], int] | None, ...]:
        """For each call its function, the sizes that change under a plan (None: the user's own), and the axis of a split."""
        found: list[tuple[str, tuple[int | None, ...], int] | None] = []
        for call in self.calls:
            if call is None:
                found.append(None)
                continue
            axes: list[Axis] = [t[call.dim] for t in call.axes] if call.function == "split" else list(call.axes[0])
            sizes: list[int | None] = []
            for axis in axes:
                mask = coupling.kept(axis, gone)
                free = any(a.labels is not None for a in axis)
                sizes.append(int(mask.sum()) if call.function == "split" or free else None)
            changed = any(not coupling.kept(a, gone).all() for a in axes)
            found.append((call.function, tuple(sizes), call.dim) if changed else None)
        return tuple(found)


# (module, visit) from the outside in; the function; the shape of its result
_Note = tuple[tuple[tuple[str, int], ...], str, tuple[int, ...]]


class _Recorder(TorchFunctionMode):
    """Notes shape-taking calls with the modules they were made in."""

    def __init__(self, stack: list[tuple[str, int]], notes: list[_Note]) -> None:
        super().__init__()
        self.stack, self.notes = stack, notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = _RESHAPES.get(func)
        if kind is not None:
            first = result[0] if isinstance(result, list | tuple) else result
            self.notes.append((tuple(self.stack), kind, tuple(first.shape)))
        return result


def record(captured: Captured, values: dict[fx.Node, Any]) -> dict[str, SizedCalls]:
    """The shape-taking calls of every module's forward, those of the modules within it included.

    Empty where the calls cannot be matched with the captured graph one by one.
    """
    notes: list[_Note] = []
    stack: list[tuple[str, int]] = []
    visits: dict[str, int] = {}

    def enter(name: str) -> None:
        stack.append((name, visits.get(name, 0)))
        visits[name] = visits.get(name, 0) + 1

    handles = []
    for name, part in captured.module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        handles.append(part.register_forward_hook(lambda *_: (stack.pop(), None)[1], always_call=True))
    try:
        with torch.no_grad(), _Recorder(stack, notes):
            captured.module(*captured.example[0], **captured.example[1])
    finally:
        for handle in handles:
            handle.remove()
    nodes = [n for n in captured.graph.nodes if n.op == "call_function" and any(operator_name(n) in k for k in _NODES.values())]
    first: dict[int, str] = {}  # a module used in several places has one name here
    every = dict(captured.module.named_modules(remove_duplicate=False))
    canonical = {name: first.setdefault(id(part), name) for name, part in every.items()}
    matched = _match(notes, nodes, canonical)
    found: dict[str, list[Call | None]] = {}
    for (modules, kind, _), node in zip(notes, matched, strict=True):
        call: Call | None = None
        if node is not None:
            value = values[node]
            several = isinstance(node.meta["val"], list | tuple)
            dim = _dim(node) if kind == "split" else 0
            call = Call(kind, tuple(value) if several else (value,), dim)
        for module, visit in modules:
            if visit == 0:  # a module called again makes the same calls again
                found.setdefault(module, []).append(call)
    return {name: SizedCalls(tuple(calls)) for name, calls in found.items()}


def _dim(node: fx.Node) -> int:
    rank = len(node.meta["val"][0].shape)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return number(dim) % rank


def _match(notes: Sequence[_Note], nodes: list[fx.Node], canonical: dict[str, str]) -> list[fx.Node | None]:
    """The node of each call: the next one of its kind and result shape in its module; None where there is none."""
    result: list[fx.Node | None] = []
    at = 0
    for modules, kind, shape in notes:
        found = None
        for k in range(at, min(at + 64, len(nodes))):
            node = nodes[k]
            value = node.meta["val"]
            first = value[0] if isinstance(value, list | tuple) else value
            names = [str(m[0]).split("@")[0] for m in node.meta.get("nn_module_stack", {}).values()]
            inner = modules[-1][0] if modules else ""
            here = canonical.get(names[-1], names[-1]) if names else inner
            if operator_name(node) in _NODES[kind] and tuple(first.shape) == shape and here == inner:
                found, at = node, k + 1
                break
        result.append(found)
    return result


class _Corrector(TorchFunctionMode):
    """Replaces the sizes of shape-taking calls, in order."""

    def __init__(self, calls: Sequence[tuple[str, tuple[int | None, ...], int] | None]) -> None:
        super().__init__()
        self.calls, self.next = calls, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _RESHAPES.get(func)
        if kind is None:
            return func(*args, **kwargs)
        call = self.calls[self.next] if self.next < len(self.calls) else None
        self.next += 1
        if call is None or call[0] != kind:
            return func(*args, **kwargs)
        return _corrected(func, kind, call[1], call[2], args, kwargs)


def _corrected(func: Any, kind: str, sizes: tuple[int | None, ...], dim: int, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    if kind == "split":
        return torch.split(x, [int(s) for s in sizes if s is not None], dim)
    if kind == "unflatten":
        at = int(args[1] if len(args) > 1 else kwargs["dim"]) % x.ndim
        given = list(args[2] if len(args) > 2 else kwargs["sizes"])
        own = sizes[at : at + len(given)]
        return func(x, at, tuple(g if s is None else s for g, s in zip(given, own, strict=True)))
    given = list(args[1:]) or list(kwargs.get("shape", kwargs.get("size", ())))
    if len(given) == 1 and isinstance(given[0], list | tuple | torch.Size):
        given = list(given[0])
    if len(given) != len(sizes) or any(not isinstance(g, int | torch.SymInt) for g in given):
        return func(*args, **kwargs)
    replaced = [g if s is None or (isinstance(g, int) and g == -1) else s for g, s in zip(given, sizes, strict=True)]
    return func(x, replaced) if kind != "expand" else x.expand(*replaced)


def correct(part: nn.Module, calls: Sequence[tuple[str, tuple[int | None, ...], int] | None]) -> None:
    """Make a module run its own forward with corrected sizes; it stays an instance of the user's class."""
    if not any(calls):
        return
    kind = type(part)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Corrector(self.__dict__["_sized_calls"]):
            run: Callable[..., Any] = kind.forward
            return run(self, *args, **kwargs)

    part.__dict__["_sized_calls"] = tuple(calls)
    part.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
