"""Restores a module's device and modes after use; plain attention; names layers that draw random numbers; unwraps wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def borrowed(module: nn.Module, device: str | None = None) -> Iterator[None]:
    """Moves a module to `device` (None: where it is) inside, its modes free to change; restores device and modes."""
    first = next(chain(module.parameters(), module.buffers()), None)
    home = None if first is None else first.device
    modes = {layer: layer.training for layer in module.modules()}
    moved = device is not None and home is not None and torch.device(device) != home
    try:
        if moved:
            module.to(device)
        yield
    finally:
        if moved:
            module.to(home)
        for layer, training in modes.items():
            layer.training = training


@contextmanager
def attention_in_steps() -> Iterator[None]:
    """nn.MultiheadAttention as the operators it consists of, not as one fused for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Returns the network inside torch.compile, DataParallel or DistributedDataParallel, and the names of these classes."""
    taken: list[str] = []
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module, taken
        taken.append(type(module).__name__)
        module = inner


def differing(module: nn.Module, *inputs: torch.Tensor) -> str:
    """The name of the first layer, innermost first, that gives something else in a second call; "" where only the whole does."""
    calls: list[tuple[str, list[torch.Tensor]]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda layer, given, output: calls.append((name, [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]))

    hooks = [layer.register_forward_hook(note(name)) for name, layer in module.named_modules() if name]
    try:
        with torch.no_grad():
            module(*inputs)
            before = calls.copy()
            calls.clear()
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(before, calls, strict=False)  # a forward may take another way the second time
    return next((a for (a, x), (b, y) in pairs if a != b or not all(map(torch.equal, x, y))), "")


def unusable(module: nn.Module) -> tuple[str, str]:
    """Returns what keeps a network from being moved or put into eval mode, and what to do; ("", "") where nothing does."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if meta := [name for name, tensor in tensors if tensor.is_meta]:
        return f"{meta[0]}, a tensor on the meta device", "make the network on the CPU, so that its tensors have values"
    # torch.export puts functions that raise in place of `train` and `eval`
    if any(isinstance(part, fx.GraphModule) and "eval" in vars(part) for part in module.modules()):
        return "an exported program", "return the module it was exported from"
    return "", ""
