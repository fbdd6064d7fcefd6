"""Cutting the user's own module: parameters and buffers at their names, then the attributes that hold sizes.

What comes back is of the user's class. Where a `forward` holds sizes that no attribute tells (a literal, a size taken from another
tensor), `sizes` corrects the calls of that module; see there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .coupling import Coupling, Plan
from .sizes import SizedCalls, correct


def cut(coupling: Coupling, plan: Plan, sized: Mapping[str, SizedCalls] | None = None) -> nn.Module:
    """The network without a plan's units, as a copy of the module that was captured.

    Args:
        coupling: what `couple` found.
        plan: group -> units that go.
        sized: corrections of calls, by the name of the module whose `forward` they are in.
    """
    gone = coupling.gone(plan)
    masks = parameter_masks(coupling, gone)
    module = _without(coupling.walk.captured.module, masks)
    counts = {
        (c.module, c.attribute): int(coupling.kept(c.axis, gone).sum()) for c in coupling.walk.counts
    }
    for name, part in module.named_modules():
        _correct_attributes(part, name, counts)
        if sized and name in sized:
            correct(part, sized[name].under(coupling, gone))
    return module


def zeroed(coupling: Coupling, plan: Plan, dtype: torch.dtype | None = None) -> nn.Module:
    """The network at its full size with zeros where a plan's units are."""
    module = copy.deepcopy(coupling.walk.captured.module)
    if dtype is not None:
        module = module.to(dtype)
    masks = parameter_masks(coupling, coupling.gone(plan))
    with torch.no_grad():
        for name, tensor in _stored(module).items():
            if name not in masks or not tensor.is_floating_point() or name.endswith("running_var"):
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


def _without(module: nn.Module, masks: Mapping[str, Mapping[int, NDArray[np.bool_]]]) -> nn.Module:
    """A copy with smaller tensors; those that are shared stay shared."""
    tensors = _stored(module)
    memo: dict[int, object] = {}
    for name, axes in masks.items():
        full = tensors[name]
        small = full.detach()
        for axis, mask in axes.items():
            small = small.index_select(axis, torch.from_numpy(np.flatnonzero(mask)).to(full.device))
        small = small.clone(memory_format=torch.contiguous_format)
        memo[id(full)] = nn.Parameter(small, requires_grad=full.requires_grad) if isinstance(full, nn.Parameter) else small
    return copy.deepcopy(module, memo)


def _correct_attributes(part: nn.Module, name: str, counts: Mapping[tuple[str, str], int]) -> None:
    """Make the attributes of torch's own layers, and of classes derived from them, say what their weights are."""
    weight = getattr(part, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
    if isinstance(part, _ConvNd) and shape:
        groups = counts.get((name, "groups"), part.groups)
        first, second = shape[0], shape[1] * groups
        part.groups = groups
        transposed = isinstance(part, _ConvTransposeNd)
        part.in_channels, part.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(part, nn.Linear) and shape:
        part.out_features, part.in_features = shape
    elif isinstance(part, _NormBase):
        stored = weight if shape else part.running_mean
        if isinstance(stored, torch.Tensor):
            part.num_features = stored.shape[0]
    elif isinstance(part, nn.GroupNorm):
        part.num_groups = counts.get((name, "num_groups"), part.num_groups)
        part.num_channels = shape[0] if shape else part.num_channels
    elif isinstance(part, nn.Embedding) and shape:
        part.num_embeddings, part.embedding_dim = shape
    elif isinstance(part, nn.PReLU) and shape:
        part.num_parameters = shape[0]
    elif type(part).__module__.split(".")[0] not in ("torch",):
        for (module, attribute), count in counts.items():  # a user's layer that calls the operator itself
            if module == name and isinstance(getattr(part, attribute, None), int):
                setattr(part, attribute, count)
