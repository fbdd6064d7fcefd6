"""The user's network as an exported graph, for analysis only; what is cut and trained is the user's own module.

`torch.export` keeps parameter names and, on every node, the modules it came from. Layers whose weights are recomputed at every
call (weight norm, spectral norm, pruning masks) are first given the weights they have, on a copy, and that is said in `notes`.
"""

from __future__ import annotations

import copy
import io
import logging
import operator
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from ..errors import InputError, brief, described
from ..network.calling import fresh
from ..network.modes import attention_in_steps, unusable, unwrapped
from .rewrites.folding import fold_computed_weights
from .rewrites.padding import padding_as_convolutions, padding_notes, pads_channels

Example = tuple[tuple[Any, ...], dict[str, Any]]
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "exponential", "poisson")


@dataclass(frozen=True)
class Captured:
    """A network ready for analysis: `module` is the copy that is analysed and cut, `graph` its operators."""

    module: nn.Module
    graph: fx.Graph
    names: Mapping[str, str]  # placeholder -> parameter or buffer of `module`
    constants: Mapping[str, torch.Tensor]  # placeholder -> tensor that is neither a parameter nor a buffer
    inputs: frozenset[str]  # placeholders the user feeds
    example: Example
    notes: tuple[str, ...]


def capture(module: nn.Module, example_inputs: Any, *, again: bool = False) -> Captured:
    """The exported graph of a network in eval mode.

    Args:
        module: the trained network; left as it is.
        example_inputs: a tensor, a tuple or list of positional inputs, or a dict of keyword inputs; one sample is enough.
        again: the module comes from an earlier capture, so that its forward has run before.

    Raises:
        InputError: the network cannot be analysed: its control flow depends on data, it answers differently each time, its
            weights are not there, or it is not a module at all. The message is one line and names the place.
    """
    example = as_example(example_inputs)
    module, notes = plain(module)
    if not again:
        with suppress(Exception):  # the export says what is wrong
            run(module, example)  # tables that forward builds in its first run and keeps are there in all the others
        module.eval()  # drops what is cached in eval mode alone: values computed from weights, in timm's LeViT and others
    program, names = _exported(module, example)
    folded = list(fold_computed_weights(module, program.graph, names, owner))
    padded = list(dict.fromkeys(owner(node)[0] for node in program.graph.nodes if pads_channels(node)))
    module, replaced = padding_as_convolutions(module, padded, partial(run, example=example))
    notes += folded + padding_notes(padded, replaced)
    if folded or replaced:
        program, names = _exported(module, example)
    signature = program.graph_signature
    constants = {
        key: program.constants[name]
        for key, name in signature.inputs_to_lifted_tensor_constants.items()
        if isinstance(program.constants.get(name), torch.Tensor)
    }
    captured = Captured(module, program.graph, names, constants, frozenset(signature.user_inputs), example, tuple(notes))
    _refuse_chance(captured)
    return captured


def _exported(module: nn.Module, example: Example) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The exported program, and the parameter or buffer that each placeholder is."""
    try:
        with warnings.catch_warnings(), torch.no_grad(), attention_in_steps(), _unlogged():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, example[0], example[1], strict=False)
    except Exception as error:  # export raises whatever the network's own code raises on fake tensors
        raise _refusal(module, example, error) from error
    _inline_regions(program.graph_module)
    return program, {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}


def _inline_regions(module: fx.GraphModule) -> None:
    """Puts the operators under `torch.autocast(enabled=False)`, `no_grad` and `enable_grad` into the graph around them, in place.

    Raises:
        InputError: autocast is enabled in forward, which makes some values half-precision.
    """
    graph = module.graph
    for region in [n for n in graph.nodes if operator_name(n) in ("wrap_with_autocast", "wrap_with_set_grad_enabled")]:
        if operator_name(region) == "wrap_with_autocast" and region.args[2]:
            where = owner(region)[0] or "forward"
            found = f"torch.autocast enabled in {where}"
            raise InputError("the network's forward", found=found, expected="float32", do="leave autocast to the caller")
        at = next(k for k, arg in enumerate(region.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
        inner = getattr(module, region.args[at].target)
        _inline_regions(inner)
        values: dict[fx.Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), region.args[at + 1 :], strict=True))
        results: Any = None
        with graph.inserting_before(region):
            for node in inner.graph.nodes:
                if node.op == "output":
                    results = fx.map_arg(node.args[0], values.__getitem__)
                elif node.op != "placeholder":
                    values[node] = graph.node_copy(node, values.__getitem__)
        for user in list(region.users):
            assert user.target is operator.getitem  # regions give tuples
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(region)
    for node in graph.find_nodes(op="get_attr"):
        if node.users:  # torch.cond, a loop: a graph of its own that depends on values
            user = next(iter(node.users))
            found = f"{operator_name(user)} in {owner(user)[0] or 'forward'}"
            raise InputError(
                "the network's forward", found=found, expected="one graph of operators", do="take it out of the network"
            )
        graph.erase_node(node)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without torch's log and prints: where an export fails they show the whole graph, and the error says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def as_example(example_inputs: Any) -> Example:
    """Positional and keyword inputs from what the user gave as an example."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), {str(k): v for k, v in example_inputs.items()}
    if isinstance(example_inputs, Sequence):
        return tuple(example_inputs), {}
    raise InputError(
        "the example inputs", found=type(example_inputs).__name__, expected="a tensor, a tuple of inputs or a dict of inputs"
    )


def plain(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy in eval mode, without wrappers and with ordinary weights, and what was done to it.

    Raises:
        InputError: it is not a module with weights of its own.
    """
    module, taken = unwrapped(module)
    notes = [f"{name} was unwrapped" for name in taken]
    if isinstance(module, torch.jit.ScriptModule) or not isinstance(module, nn.Module):
        raise InputError(
            "the network", found=type(module).__name__, expected="a torch.nn.Module in Python", do="give the model itself"
        )
    found, do = unusable(module)
    if found:
        raise InputError("the network", found=found, expected="an nn.Module with values", do=do)
    memo: dict[int, Any] = {  # a tensor that an old-style hook computed cannot be copied by deepcopy
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and value.grad_fn is not None
    }
    try:
        module = copy.deepcopy(module, memo).eval()
    except Exception as error:
        raise InputError("the network cannot be copied", found=described(error)) from error
    for name, part in module.named_modules():
        notes += [f"{name or 'the network'}: {what}" for what in _with_plain_weights(part)]
    return module, notes


def _with_plain_weights(part: nn.Module) -> Iterator[str]:
    """Replace weights that are computed at every call by their present values; says which."""
    if parametrize.is_parametrized(part):
        assert isinstance(part.parametrizations, nn.ModuleDict)
        # a copy shares its generated class with the original, and removing deletes the weight's property from that class
        shared = type(part)
        part.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        for tensor in list(part.parametrizations):
            kind = type(part.parametrizations[tensor][0]).__name__  # type: ignore[index]
            parametrize.remove_parametrizations(part, tensor, leave_parametrized=True)
            yield f"{kind} folded into {tensor}"
    hooks: dict[int, Any] = dict(part._forward_pre_hooks)
    for key, hook in hooks.items():
        kind = type(hook).__name__
        if kind in ("WeightNorm", "SpectralNorm") and hasattr(hook, "name"):
            with torch.no_grad():
                value = hook.compute_weight(part) if kind == "WeightNorm" else hook.compute_weight(part, do_power_iteration=False)
            tensor = hook.name
            for old in (f"{tensor}_g", f"{tensor}_v", f"{tensor}_orig"):
                part._parameters.pop(old, None)
            for old in (f"{tensor}_u", f"{tensor}_v"):
                part._buffers.pop(old, None)
            part.__dict__.pop(tensor, None)
            part.register_parameter(tensor, nn.Parameter(value.detach().clone()))
            del part._forward_pre_hooks[key]
            yield f"{kind} folded into {tensor}"
        elif hasattr(hook, "_tensor_name") and hasattr(hook, "apply_mask"):
            hook.remove(part)
            del part._forward_pre_hooks[key]
            part.__dict__.pop(hook._tensor_name, None)
            yield f"pruning mask folded into {hook._tensor_name}"


def operator_name(node: fx.Node) -> str:
    """The ATen operator of a node without overload and in-place underscore: conv2d, add, view."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return str(name).rstrip("_") if not str(name).startswith("_") else str(name)


def owner(node: fx.Node) -> tuple[str, str]:
    """(name, class) of the innermost of the user's modules that called an operator."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "", ""
    name, kind = stack[-1]
    return str(name).split("@")[0], kind if isinstance(kind, str) else kind.__name__


def stack(node: fx.Node) -> list[str]:
    """Names of the user's modules that an operator was called in, the outermost first, without the network itself."""
    names = (str(name).split("@")[0] for name, _ in node.meta.get("nn_module_stack", {}).values())
    return [name for name in names if name]


def run(module: nn.Module, example: Example, *, in_steps: bool = False) -> list[torch.Tensor]:
    """The numbers a module answers an example with, see `numbers_in`; by the operators it was captured as if `in_steps`."""
    with torch.no_grad(), attention_in_steps() if in_steps else nullcontext():
        args, named = fresh(example)
        return numbers_in(module(*args, **named))


def numbers_in(value: Any) -> list[torch.Tensor]:
    """The tensors in a result that can be compared, in order, wherever they lie in it: real parts beside imaginary ones.

    Integers, such as classes, only where there is nothing else.
    """
    found = [torch.view_as_real(t) if t.is_complex() else t for t in tensors_in(value)]
    real = [t for t in found if t.is_floating_point()]
    return real or [t.double() for t in found]


def larger_batch(example: Example, times: int) -> Example:
    """An example of `times` as many samples, none like another: each tensor repeated along axis 0, backwards and shifted."""

    def grown(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.ndim or len(value) != samples:
                return value
            return torch.cat([value, *(value.flip(-1).roll(k, -1) if value.ndim > 1 else value for k in range(times - 1))])
        if isinstance(value, list | tuple):
            return type(value)(grown(v) for v in value)
        return {k: grown(v) for k, v in value.items()} if isinstance(value, dict) else value

    samples = next((len(t) for t in tensors_in(example) if t.ndim), 0)
    return grown(example[0]), grown(example[1])


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from tensors_in(vars(value))


def _refuse_chance(captured: Captured) -> None:
    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        name = operator_name(node)
        dropout = "dropout" in name and len(node.args) > 2 and bool(node.args[2]) and bool(node.args[1])
        chance = dropout or any(part in name for part in _RANDOM)
        if chance and node.users:
            first, second = (run(captured.module, captured.example, in_steps=True) for _ in range(2))
            if any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                raise InputError(
                    "the network answers the same input differently each time",
                    found=f"{name} in {owner(node)[0] or 'forward'}, active in eval mode",
                    expected="a deterministic forward in eval mode",
                    do="give F.dropout training=self.training, or use nn.Dropout",
                )


def _refusal(module: nn.Module, example: Example, error: Exception) -> InputError:
    try:
        run(module, example)
    except Exception as plainly:
        return InputError("the network does not run on the example inputs", found=f"{brief(plainly)} ({_place(plainly)})")
    kind = type(error).__name__
    data = "DataDependent" in kind or "data-dependent" in str(error) or "Dynamic" in kind or "unbacked" in str(error).lower()
    return InputError(
        "the network's forward depends on the values of its input" if data else "the network cannot be exported",
        found=_place(error) if data else f"{brief(error)} ({_place(error)})",
        expected="a forward whose operators depend on shapes only",
        do="move that part out of the network that is compressed",
    )


def _place(error: BaseException) -> str:
    """File, line and text of the innermost line outside of torch that raised."""
    torch_root, here = (f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))  # torchvision lies beside torch
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torch_root, here, "<"))]
    if not frames:
        return "in torch"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"
