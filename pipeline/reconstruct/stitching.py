"""Candidates' weights: every layer that lost inputs re-fit by itself to the dense network's inputs.

A layer is solved once for each set of inputs that are left, and candidates are stitched from the solutions (the layer-wise
database of SPDY, Frantar & Alistarh 2022, arXiv 2201.13096). The search judges by it; the chosen plan is reconstructed
sequentially afterwards, see `sequential.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..axes.coupling import Coupling, Plan
from ..axes.cutting.sizes import SizedCalls
from ..axes.cutting.surgery import cut, parameter_masks
from ..network.memory import TensorCache
from ..score.layer_moments import LayerMoments
from .least_squares import DAMPING, solve_intercept


class Fitter:
    """Re-fits single layers against the dense network's inputs, each once for each set of inputs that are left.

    Solutions take at most a quarter of the memory that the moments may take, beside them; the least recently used are solved
    again when they are needed.
    """

    def __init__(self, moments: LayerMoments) -> None:
        self.moments = moments
        self._solved: TensorCache[tuple[str, bytes], tuple[Tensor, Tensor]] = TensorCache(moments.memory_bytes // 4)

    def fitted(self, name: str, kept: NDArray[np.bool_]) -> tuple[Tensor, Tensor] | None:
        """Weight (outputs, kept inputs, ...) and change of the bias (outputs,) of a layer that reads only some of its inputs.

        The change is zero for a layer without a bias. None: the layer's moments are not known.
        """
        if name not in self.moments.gram:
            return None
        return self._solved.get((name, kept.tobytes()), lambda: self._solve(name, kept))

    def _solve(self, name: str, kept: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        gram = self.moments.gram[name]
        weight = self.moments.module.get_parameter(name).detach()
        keep = torch.from_numpy(np.flatnonzero(np.repeat(kept, weight[0, 0].numel())))
        flat = weight.flatten(1).double()
        rows = torch.cat([keep, torch.tensor([len(gram) - 1])])
        full = torch.cat([flat, flat.new_zeros(len(flat), 1)], 1)
        solved = solve_intercept(gram[rows][:, rows], (full @ gram)[:, rows], flat[:, keep], DAMPING, None)
        shape = (len(weight), int(kept.sum()), *weight.shape[2:])
        return solved[:, :-1].to(weight.dtype).view(shape), solved[:, -1].to(weight.dtype)


def stitched(coupling: Coupling, plan: Plan, sized: Mapping[str, SizedCalls], fitter: Fitter) -> nn.Module:
    """The network without a plan's units, every layer that lost inputs re-fit to the dense network's outputs by itself."""
    small = cut(coupling, plan, sized)
    dense = coupling.walk.captured.module
    masks = parameter_masks(coupling, coupling.gone(plan))
    tensors = dict(small.named_parameters())
    with torch.no_grad():
        for name, axes in masks.items():
            fitted = fitter.fitted(name, axes[1]) if 1 in axes else None
            if fitted is None or name not in tensors:  # inside a branch that goes
                continue
            weight, shift = fitted
            rows = rows_of(axes, len(weight))
            scale = scale_of(tensors[name], dense.get_parameter(name), axes).to(weight)
            tensors[name].copy_(weight[rows] * scale.view(-1, *[1] * (weight.ndim - 1)))
            bias = fitter.moments.bias[name]
            if bias is not None:
                tensors[bias].add_(shift[rows] * scale)
    return small


def rows_of(axes: Mapping[int, NDArray[np.bool_]], count: int) -> Tensor:
    """The outputs that stay."""
    return torch.from_numpy(np.flatnonzero(axes[0])) if 0 in axes else torch.arange(count)


def scale_of(small: Tensor, dense: Tensor, axes: Mapping[int, NDArray[np.bool_]]) -> Tensor:
    """What surgery multiplied each row with: not 1 for attention that lost dimensions, see `axes.cutting.scaling`."""
    full = dense.detach()[rows_of(axes, len(dense)).to(dense.device)]
    if 1 in axes:
        full = full[:, torch.from_numpy(np.flatnonzero(axes[1])).to(dense.device)]
    full, own = full.flatten(1).double(), small.detach().flatten(1).double()
    ratio = (own * full).sum(1) / full.square().sum(1).clamp_min(1e-30)
    largest = own.abs().amax(1)
    scaled = (largest > 0) & ((own - ratio[:, None] * full).abs().amax(1) <= 1e-5 * largest)
    return torch.where(scaled, ratio, 1.0)
