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

from ...network.calling import fresh
from ...network.modes import attention_in_steps
from ..algebra import Axis
from ..capture import Captured, Example, larger_batch, operator_name, tensors_in
from ..walk import Axes, number

if TYPE_CHECKING:
    from ..coupling import Coupling

TIMES = 2  # samples for one of the example, to see which sizes follow the batch
_RESHAPES: dict[Any, str] = {
    torch.Tensor.view: "view", torch.Tensor.reshape: "reshape", torch.reshape: "reshape",
    torch.Tensor.unflatten: "unflatten", torch.unflatten: "unflatten",
    torch.Tensor.expand: "expand",
    torch.Tensor.split: "split", torch.split: "split", torch.functional.split: "split",
    torch.Tensor.split_with_sizes: "split", torch.split_with_sizes: "split",
    torch.Tensor.__getitem__: "slice", torch.Tensor.narrow: "slice", torch.narrow: "slice",
}  # fmt: skip
_NODES = {"view": {"view"}, "reshape": {"reshape", "view"}, "unflatten": {"unflatten"}, "expand": {"expand"},
          "split": {"split", "split_with_sizes"}, "slice": {"slice", "narrow"}}  # fmt: skip


Size = tuple[int, bool]  # on the example; whether it grows with the batch
# function; sizes, None where the user's own stays; the axis of a split, or of a slice, whose sizes are its start and its length
Corrected = tuple[str, tuple[Size | None, ...], int]


@dataclass(frozen=True)
class Call:
    """One shape-taking call: which function, and the axes of its result or results; of a slice those of what is sliced."""

    function: str
    axes: tuple[Axes, ...]
    dim: int = 0  # of a split or a slice
    bounds: tuple[int, int] = (0, 0)  # of a slice
    batch: tuple[bool, ...] = ()  # whether each axis of its first result is as many times as long in a larger batch


@dataclass(frozen=True)
class SizedCalls:
    """The shape-taking calls of one module's forward, in order."""

    calls: tuple[Call | None, ...]
    batch: tuple[int, int] | None = None  # the axis of its first input that follows the batch, and its size on the example

    def under(self, coupling: Coupling, gone: NDArray[np.bool_]) -> tuple[Corrected | None, ...]:
        """Returns for each call what changes under a plan; None: nothing does."""
        found: list[Corrected | None] = []
        for call in self.calls:
            if call is None:
                found.append(None)
                continue
            if call.function == "slice":
                mask, (start, stop) = coupling.kept(call.axes[0][call.dim], gone), call.bounds
                place = ((int(mask[:start].sum()), False), (int(mask[start:stop].sum()), False))
                found.append(None if mask.all() else (call.function, place, call.dim))
                continue
            axes: list[Axis] = [t[call.dim] for t in call.axes] if call.function == "split" else list(call.axes[0])
            sizes: list[Size | None] = []
            for k, axis in enumerate(axes):
                mask = coupling.kept(axis, gone)
                free = any(a.labels is not None for a in axis)
                grows = call.function != "split" and k < len(call.batch) and call.batch[k]
                sizes.append((int(mask.sum()), grows) if call.function == "split" or free else None)
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
        kind = _kind(func, args)
        if kind is not None:
            first = result[0] if isinstance(result, list | tuple) else result
            self.notes.append((tuple(self.stack), kind, tuple(first.shape)))
        return result


def _kind(func: Any, args: Any) -> str | None:
    """Which shape-taking function a call is of; of all that square brackets can mean, only slices."""
    kind = _RESHAPES.get(func)
    if func is not torch.Tensor.__getitem__:
        return kind
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return kind if all(isinstance(part, slice) or part is Ellipsis for part in index) else None


def holds_sizes(coupling: Coupling, gone: NDArray[np.bool_], small: nn.Module) -> bool:
    """Whether calls in a cut network give other sizes than the labels say: its forward, or an attribute, holds the full ones."""
    captured = coupling.walk.captured
    wanted = record(captured, coupling.walk.values, larger=False).get("")
    if wanted is None:
        return False
    notes, _ = _noted(small, captured.example)
    expected = wanted.under(coupling, gone)
    if len(expected) != len(notes):
        return False
    for call, (_, _, shape) in zip(expected, notes, strict=True):
        if call is not None and call[0] == "split":
            call = (call[0], (*[None] * call[2], call[1][0]), 0)
        if call is not None and call[0] == "slice":
            call = (call[0], (*[None] * call[2], call[1][1]), 0)
        if call is not None and any(size is not None and size[0] != n for size, n in zip(call[1], shape, strict=False)):
            return True
    return False


def record(captured: Captured, values: dict[fx.Node, Any], *, larger: bool = True) -> dict[str, SizedCalls]:
    """The shape-taking calls of every module's forward, those of the modules within it included.

    Empty where the calls cannot be matched with the captured graph one by one. Unless `larger`, nothing is known of batches.
    """
    notes, inputs = _noted(captured.module, captured.example)
    grown, more = _noted_in_a_larger_batch(captured) if larger else ([], {})
    if [note[:2] for note in grown] != [note[:2] for note in notes]:
        grown = notes  # nothing grows, as far as is known
    nodes = [n for n in captured.graph.nodes if n.op == "call_function" and any(operator_name(n) in k for k in _NODES.values())]
    first: dict[int, str] = {}  # a module used in several places has one name here
    every = dict(captured.module.named_modules(remove_duplicate=False))
    canonical = {name: first.setdefault(id(part), name) for name, part in every.items()}
    matched = _match(notes, nodes, canonical)
    found: dict[str, list[Call | None]] = {}
    for (modules, kind, shape), (_, _, other), node in zip(notes, grown, matched, strict=True):
        call: Call | None = None
        if node is not None:
            value = values[node]
            several = isinstance(node.meta["val"], list | tuple)
            dim = _dim(node) if kind == "split" else 0
            grows = tuple(n == TIMES * m for m, n in zip(shape, other, strict=False))
            call = Call(kind, tuple(value) if several else (value,), dim, batch=grows)
            if kind == "slice":
                dim, bounds = _bounds(node)
                call = None if bounds is None else Call(kind, (values[node.all_input_nodes[0]],), dim, bounds)
        for module, visit in modules:
            if visit == 0:  # a module called again makes the same calls again
                found.setdefault(module, []).append(call)
    batch = {
        name: next(((k, m) for k, (m, n) in enumerate(zip(shape, more.get(name, ()), strict=False)) if n == TIMES * m), None)
        for name, shape in inputs.items()
    }
    return {name: SizedCalls(tuple(calls), batch.get(name)) for name, calls in found.items()}


def _noted(module: nn.Module, example: Example) -> tuple[list[_Note], dict[str, tuple[int, ...]]]:
    """The shape-taking calls of a run, and the shape of the first tensor that each module was first given."""
    notes: list[_Note] = []
    stack: list[tuple[str, int]] = []
    visits: dict[str, int] = {}
    inputs: dict[str, tuple[int, ...]] = {}

    def enter(name: str, given: Any) -> None:
        stack.append((name, visits.get(name, 0)))
        visits[name] = visits.get(name, 0) + 1
        inputs.setdefault(name, next((tuple(t.shape) for t in tensors_in(given)), ()))

    given, named = fresh(example)
    handles = []
    for name, part in module.named_modules():
        handles.append(
            part.register_forward_pre_hook(lambda _, args, kwargs, name=name: enter(name, (args, kwargs)), with_kwargs=True)
        )
        handles.append(part.register_forward_hook(lambda *_: (stack.pop(), None)[1], always_call=True))
    try:
        with torch.no_grad(), attention_in_steps(), _Recorder(stack, notes):
            module(*given, **named)
    finally:
        for handle in handles:
            handle.remove()
    return notes, inputs


def _noted_in_a_larger_batch(captured: Captured) -> tuple[list[_Note], dict[str, tuple[int, ...]]]:
    """The same for `TIMES` as many samples; nothing where the network takes no other number."""
    try:
        return _noted(captured.module, larger_batch(captured.example, TIMES))
    except Exception:  # the user's forward, on a batch it was not written for
        return [], {}


def _dim(node: fx.Node) -> int:
    rank = len(node.meta["val"][0].shape)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return number(dim) % rank


def _bounds(node: fx.Node) -> tuple[int, tuple[int, int] | None]:
    """The axis of a slice, and where it starts and ends; None where it leaves out some in between."""
    source: Any = node.args[0]
    given = [*node.args[1:], *[None] * 4][:4]
    dim = number(given[0] or 0) % source.meta["val"].ndim
    size = int(source.meta["val"].shape[dim])
    if operator_name(node) == "narrow":
        start = number(given[1]) % size
        return dim, (start, start + number(given[2]))
    start, stop, step = slice(given[1], given[2], given[3]).indices(size)
    return dim, (start, stop) if step == 1 else None


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

    def __init__(self, calls: Sequence[Corrected | None], times: int) -> None:
        super().__init__()
        self.calls, self.times, self.next = calls, times, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func, args)
        if kind is None:
            return func(*args, **kwargs)
        call = self.calls[self.next] if self.next < len(self.calls) else None
        self.next += 1
        if call is None or call[0] != kind:
            return func(*args, **kwargs)
        sizes = [None if size is None else size[0] * (self.times if size[1] else 1) for size in call[1]]
        return _corrected(func, kind, sizes, call[2], args, kwargs)


def _corrected(func: Any, kind: str, sizes: list[int | None], dim: int, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else kwargs["input"]
    if kind == "split":
        return torch.split(x, [int(s) for s in sizes if s is not None], dim)
    if kind == "slice":
        start, length = (int(s) for s in sizes if s is not None)
        if func is not torch.Tensor.__getitem__:
            return x.narrow(dim, start, length)
        index = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
        at = index.index(Ellipsis) if Ellipsis in index else len(index)
        place = dim if dim < at else len(index) - (x.ndim - dim)
        if 0 <= place < len(index):
            index[place] = slice(start, start + length)
            return func(x, tuple(index))
        return func(*args, **kwargs)
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


def correct(part: nn.Module, calls: Sequence[Corrected | None], batch: tuple[int, int] | None) -> None:
    """Make a module run its own forward with corrected sizes; it stays an instance of the user's class.

    Args:
        part: the module.
        calls: what changes in each of its calls.
        batch: the axis of its first input that follows the batch, and its size on the example; None: sizes stay the example's.
    """
    if not any(calls):
        return
    kind = type(part)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        first = next(tensors_in((args, kwargs)), None)
        axis, size = batch or (0, 0)
        times = first.shape[axis] // size if size and first is not None and first.ndim > axis else 1
        with _Corrector(self.__dict__["_sized_calls"], times):
            run: Callable[..., Any] = kind.forward
            return run(self, *args, **kwargs)

    part.__dict__["_sized_calls"] = tuple(calls)
    part.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
