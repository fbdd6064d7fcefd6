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
from torch.utils import _pytree as pytree

Call = Callable[[nn.Module], list[torch.Tensor]]


def pads_channels(node: fx.Node) -> bool:
    """Whether an operator of an exported graph pads axis 1 of four, and that alone."""
    if node.target not in (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default):
        return False
    pads = node.args[1]
    return isinstance(pads, list | tuple) and len(pads) == 6 and not any(pads[:4])


def padding_as_convolutions(module: nn.Module, owners: Sequence[str], call: Call) -> tuple[nn.Module, list[str]]:
    """The network with 1x1 convolutions for zero padding of channels, changed in place, and the modules that were replaced.

    What cannot be traced stays, and so does a `forward` that is another in training mode, or that overwrites tensors. If the
    whole network then answers otherwise, or does not run, everything stays.

    Args:
        module: the network, eval mode.
        owners: names of the modules in whose own `forward` channels are padded.
        call: what a network answers its example with.
    """
    seen: dict[str, tuple[Any, ...]] = {}  # module -> the arguments of one call
    with ExitStack() as stack:
        for name in owners:
            part = module.get_submodule(name)
            stack.callback(part.register_forward_pre_hook(partial(_keep, seen, name), with_kwargs=True).remove)
        expected = call(module) if owners else []
    before: dict[str, nn.Module] = {}
    for name, args in sorted(seen.items(), key=lambda pair: -len(pair[0])):  # inner modules before those that hold them
        part = module.get_submodule(name)
        new = _rewritten(part, args)
        if new is not None:
            before[name] = part
            module = _with(module, name, new)
    if before and not _same(expected, call, module):
        for name, part in reversed(before.items()):
            module = _with(module, name, part)
        before = {}
    return module, list(before)


def padding_notes(owners: Sequence[str], replaced: Sequence[str]) -> list[str]:
    """What was done about the zero padding in each module, for the report."""
    stays = "its padding of channels could not be replaced by a 1x1 convolution"
    done = "zero padding of channels as a 1x1 convolution"
    return [f"{name or 'the network'}: {done if name in replaced else stays}" for name in owners]


def _with(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    if not name:
        return part
    module.set_submodule(name, part)
    return module


def _same(expected: list[torch.Tensor], call: Call, module: nn.Module) -> bool:
    """Whether the network still answers as it did."""
    try:
        found = call(module)
    except Exception:  # a parent reads what a module had that was replaced
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))


def _keep(seen: dict[str, tuple[Any, ...]], name: str, part: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    if not named:
        seen[name] = pytree.tree_map_only(torch.Tensor, torch.clone, args)


class _Shallow(fx.Tracer):
    """Traces one `forward`; the modules it calls stay as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _rewritten(part: nn.Module, args: tuple[Any, ...]) -> nn.Module | None:
    try:
        traced = fx.GraphModule(part, _Shallow().trace(part), type(part).__name__)
        training = fx.GraphModule(part, _Shallow().trace(part.train()), type(part).__name__)
        part.eval()  # before anything is computed: BatchNorm would take its statistics from it
        if training.code != traced.code:  # dropout as a function: one trace would hold one of the two modes
            return None
        with torch.no_grad():
            ShapeProp(traced).propagate(*pytree.tree_map_only(torch.Tensor, torch.clone, args))
        if not sum(_replace(traced, node) for node in list(traced.graph.nodes)):
            return None
        traced.recompile()
        return traced.eval()
    except Exception:  # fx raises whatever the user's own code raises on a proxy
        return None
    finally:
        part.eval()


def _replace(traced: fx.GraphModule, node: fx.Node) -> bool:
    pads = _channel_padding(node)
    if pads is None:
        return False
    source: Any = node.args[0]
    (front, back), stride = pads, 1
    if (start := _subsampling(source)) is not None:
        source, stride = start
    channels = source.meta["tensor_meta"].shape[1]
    like = next(traced.parameters(), torch.empty(0))
    conv = nn.Conv2d(channels, channels + front + back, 1, stride, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[torch.arange(channels) + front, torch.arange(channels), 0, 0] = 1.0
    name = f"shortcut_{sum(1 for n, _ in traced.named_children() if n.startswith('shortcut_'))}"
    traced.add_submodule(name, conv.to(like.device, source.meta["tensor_meta"].dtype))
    with traced.graph.inserting_after(node):
        new = traced.graph.call_module(name, (source,))
    node.replace_all_uses_with(new)
    for gone in (node, *([node.args[0]] if stride > 1 else [])):
        if isinstance(gone, fx.Node) and not gone.users:
            traced.graph.erase_node(gone)
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
