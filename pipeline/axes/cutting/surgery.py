"""Cutting the user's own module: parameters and buffers at their names, then the attributes that hold sizes.

What comes back is of the user's class. Where a `forward` holds sizes that no attribute tells (a literal, a size taken from
another tensor), `sizes` corrects the calls of that module; see there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..coupling import Coupling, Plan
from ..types import Block
from .branches import leave_out
from .heads import in_steps, reads_less, shrink
from .scaling import needs_rescale, rescale
from .sizes import SizedCalls, correct


def cut(coupling: Coupling, plan: Plan, sized: Mapping[str, SizedCalls] | None = None, *, shared: bool = False) -> nn.Module:
    """The network without a plan's units, as a copy of the module that was captured.

    Args:
        coupling: what `couple` found.
        plan: group -> units that go, block -> 0 if it goes.
        sized: corrections of calls, by the name of the module whose `forward` they are in.
        shared: parameters that stay whole are those of the captured module, not copies: for a trial in eval mode alone, that
            moves to no other device or precision.
    """
    gone = coupling.gone(plan)
    masks = parameter_masks(coupling, gone)
    full = coupling.walk.captured.module
    if needs_rescale(coupling, gone):
        full = rescale(copy.deepcopy(full), coupling, gone)
    module = _without(full, masks, shared)
    first: dict[int, str] = {}  # a module used in several places has one name here
    every = dict(coupling.walk.captured.module.named_modules(remove_duplicate=False))
    canonical = {name: first.setdefault(id(part), name) for name, part in every.items()}
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for count in coupling.walk.counts:
        mask = coupling.kept(count.axis, gone)
        if not mask.all():
            counts[canonical.get(count.module, count.module), count.attribute] = len(mask), int(mask.sum())
    for name, part in module.named_modules():
        own = sized.get(name) if sized else None
        calls = own.under(coupling, gone) if own is not None else ()
        if any(calls):  # its attributes keep the sizes that its own arithmetic was written for
            assert own is not None
            correct(part, calls, own.batch)
        else:
            _correct_attributes(part, name, counts)
    leave_out(module, [_with_shape(block, coupling, gone) for block in coupling.left_out(plan)])
    if masks or coupling.left_out(plan):
        in_steps(module)
    return module


def _with_shape(block: Block, coupling: Coupling, gone: NDArray[np.bool_]) -> Block:
    """The block with the shape that its value has without a plan's units."""
    if not block.full:
        return block
    end = next(node for node in coupling.walk.captured.graph.nodes if node.name == block.end)
    return replace(block, shape=tuple(int(coupling.kept(axis, gone).sum()) for axis in coupling.walk.axes(end)[1:]))


def zeroed(
    coupling: Coupling, plan: Plan, dtype: torch.dtype | None = None, *, vectors: bool = True, shared: bool = False
) -> nn.Module:
    """The network at its full size with zeros where a plan's units are; in vectors only if `vectors`. `shared`: see `cut`."""
    full = coupling.walk.captured.module
    masks = parameter_masks(coupling, coupling.gone(plan))
    module = copy.deepcopy(full, _whole(full, masks) if shared else {})
    if dtype is not None:
        module = module.to(dtype)
    with torch.no_grad():
        for name, tensor in _stored(module).items():
            numbers = tensor.is_floating_point() or tensor.is_complex()
            if name not in masks or not numbers or name.endswith("running_var") or (tensor.squeeze().ndim < 2 and not vectors):
                continue
            for axis, mask in masks[name].items():
                gone = torch.from_numpy(np.flatnonzero(~mask)).to(tensor.device)
                tensor.index_fill_(axis, gone, 0.0)
    return module


def parameter_masks(coupling: Coupling, gone: NDArray[np.bool_]) -> dict[str, dict[int, NDArray[np.bool_]]]:
    """Parameter or buffer -> axis -> which positions stay, where any goes."""
    found: dict[str, dict[int, NDArray[np.bool_]]] = {}
    for name, axes in coupling.walk.parameters.items():
        for k, axis in enumerate(axes):
            mask = coupling.kept(axis, gone)
            if not mask.all():
                found.setdefault(name, {})[k] = mask
    return found


def _stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _whole(module: nn.Module, masks: Mapping[str, object]) -> dict[int, object]:
    """A memo for `copy.deepcopy` in which the parameters without a mask count as copied."""
    tensors = _stored(module)
    masked = {id(tensors[name]) for name in masks}
    return {id(p): p for p in module.parameters() if id(p) not in masked}


def _without(module: nn.Module, masks: Mapping[str, Mapping[int, NDArray[np.bool_]]], shared: bool) -> nn.Module:
    """A copy with smaller tensors; tied ones stay tied. `shared`: see `cut`."""
    tensors = _stored(module)
    memo = _whole(module, masks) if shared else {}
    for name, axes in masks.items():
        full = tensors[name]
        small = full.detach()
        for axis, mask in axes.items():
            small = small.index_select(axis, torch.from_numpy(np.flatnonzero(mask)).to(full.device))
        small = small.clone(memory_format=torch.contiguous_format)
        memo[id(full)] = nn.Parameter(small, requires_grad=full.requires_grad) if isinstance(full, nn.Parameter) else small
    return copy.deepcopy(module, memo)


def _correct_attributes(part: nn.Module, name: str, counts: Mapping[tuple[str, str], tuple[int, int]]) -> None:
    """Make the attributes that hold sizes say what the weights are: torch's own layers first, then by the attribute's name."""
    weight = getattr(part, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
    mine = {attribute: sizes for (module, attribute), sizes in counts.items() if module == name}
    if isinstance(part, nn.MultiheadAttention):
        narrower = part.out_proj.out_features != len(part.out_proj.weight) or reads_less(part)
        if narrower or "num_heads" in mine or "head_dim" in mine:
            before, after = mine.get("num_heads", (1, 1))  # of all samples of the example
            shrink(part, part.num_heads * after // before)
        return
    for attribute, (old, new) in mine.items():
        if type(getattr(part, attribute, None)) is int and getattr(part, attribute) == old:
            setattr(part, attribute, new)
    if isinstance(part, _ConvNd) and shape:
        first, second = shape[0], shape[1] * part.groups
        transposed = isinstance(part, _ConvTransposeNd)
        part.in_channels, part.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(part, nn.Linear) and shape:
        part.out_features, part.in_features = shape
    elif isinstance(part, _NormBase):
        stored = weight if shape else part.running_mean
        if isinstance(stored, torch.Tensor):
            part.num_features = stored.shape[0]
    elif isinstance(part, nn.GroupNorm) and shape:
        part.num_channels = shape[0]
    elif isinstance(part, nn.Embedding) and shape:
        part.num_embeddings, part.embedding_dim = shape
    elif isinstance(part, nn.PReLU) and shape:
        part.num_parameters = shape[0]
    elif isinstance(getattr(part, "normalized_shape", None), tuple) and len(shape) == 1:
        part.normalized_shape = shape  # type: ignore[assignment]  # of torch and timm
