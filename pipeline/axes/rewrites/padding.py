"""Zero-padded shortcuts as 1x1 convolutions that select channels.

He et al. 2015 (arXiv 1512.03385), option A: a shortcut subsamples, then pads the channels with zeros. With a convolution in its
place the channels on either side of it can go independently, and no padding can shift what it is added to. The convolution is
trainable: with the selection as its start.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp


def padding_as_convolutions(module: nn.Module, owners: Sequence[str], call: Callable[[], object]) -> tuple[nn.Module, list[str]]:
    """The network with 1x1 convolutions for zero padding of channels, changed in place, and what was done to it.

    What cannot be traced, or would answer differently, stays.

    Args:
        module: the network, eval mode.
        owners: names of the modules in whose own `forward` something is padded.
        call: runs the network on its example.
    """
    seen: dict[str, tuple[Any, ...]] = {}  # module -> the arguments of one call
    with ExitStack() as stack:
        for name in owners:
            part = module.get_submodule(name)
            stack.callback(part.register_forward_pre_hook(partial(_keep, seen, name), with_kwargs=True).remove)
        if owners:
            call()
    notes = []
    for name, args in sorted(seen.items(), key=lambda pair: -len(pair[0])):  # inner modules before those that hold them
        new = _rewritten(module.get_submodule(name), args)
        if new is None:
            continue
        notes.append(f"{name or 'the network'}: zero padding of channels as a 1x1 convolution")
        if name:
            module.set_submodule(name, new)
        else:
            module = new
    return module, notes


def _keep(seen: dict[str, tuple[Any, ...]], name: str, part: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    if not named:
        seen[name] = args


class _Shallow(fx.Tracer):
    """Traces one `forward`; the modules it calls stay as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _rewritten(part: nn.Module, args: tuple[Any, ...]) -> nn.Module | None:
    try:
        traced = fx.GraphModule(part, _Shallow().trace(part), type(part).__name__)
        with torch.no_grad():
            ShapeProp(traced).propagate(*args)
            expected = part(*args)
            count = sum(_replace(traced, node) for node in list(traced.graph.nodes))
            traced.graph.eliminate_dead_code()
            traced.recompile()
            found = traced(*args)
    except Exception:  # fx raises whatever the user's own code raises on a proxy
        return None
    same = count and isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
    return traced.train(part.training) if same else None


def _replace(traced: fx.GraphModule, node: fx.Node) -> bool:
    pads = _channel_padding(node)
    if pads is None:
        return False
    source: Any = node.args[0]
    (front, back), stride = pads, 1
    if (start := _subsampling(source)) is not None:
        source, stride = start
    channels = source.meta["tensor_meta"].shape[1]
    conv = nn.Conv2d(channels, channels + front + back, 1, stride, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[torch.arange(channels) + front, torch.arange(channels), 0, 0] = 1.0
    name = f"shortcut_{sum(1 for n, _ in traced.named_children() if n.startswith('shortcut_'))}"
    traced.add_submodule(name, conv.to(dtype=source.meta["tensor_meta"].dtype))
    with traced.graph.inserting_after(node):
        new = traced.graph.call_module(name, (source,))
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)
    return True


def _channel_padding(node: fx.Node) -> tuple[int, int] | None:
    """(front, back) when a node pads the channels of an (N, C, H, W) tensor with zeros and nothing else."""
    if node.op != "call_function" or node.target not in (F.pad, torch._C._nn.pad):
        return None
    arguments = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    pad, source = arguments.get("pad"), arguments.get("input")
    if not isinstance(source, fx.Node) or not isinstance(pad, list | tuple) or source is not (node.args or (None,))[0]:
        return None
    shape = getattr(source.meta.get("tensor_meta"), "shape", ())
    zeros = arguments.get("mode", "constant") == "constant" and arguments.get("value", 0) in (0, None)
    if not zeros or len(shape) != 4 or len(pad) != 6 or any(pad[:4]) or not all(isinstance(p, int) and p >= 0 for p in pad):
        return None
    return pad[4], pad[5]  # type: ignore[return-value]


def _subsampling(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(source, stride) when a node is x[:, :, ::s, ::s]."""
    if node.op != "call_function" or node.target is not operator.getitem or len(node.users) != 1:
        return None
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, tuple) or len(index) != 4:
        return None
    if any(not isinstance(i, slice) or i.start or i.stop is not None for i in index):
        return None
    steps = [i.step or 1 for i in index]  # type: ignore[union-attr]
    if steps[:2] != [1, 1] or steps[2] != steps[3] or not isinstance(steps[2], int):
        return None
    return source, steps[2]
