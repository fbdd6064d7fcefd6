"""GPTQ: error-compensating rounding of weights to the grid of an int8 file.

Rounding to the nearest value treats each weight alone; what a layer gets wrong is a sum over correlated inputs. The rule is
that of Optimal Brain Quantization (Frantar and Alistarh 2022, arXiv 2208.11580) in the fixed order of GPTQ (Frantar et al. 2023,
arXiv 2210.17323), on the layer-local Hessian of the pruned network's inputs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..network.calling import Inputs, count_of
from ..network.compute import CPU, Compute
from ..score.curvature import local_hessian

_log = logging.getLogger(__name__)
SAMPLES = 100  # for the layer Hessians
DAMPING = 0.01  # share of the mean diagonal added to the diagonal
LARGEST = 5000  # inputs of a layer, kernel included: its Hessian and four matrices as large have to fit
STEPS = 127  # of an 8-bit weight to either side of zero


def round_weights(
    module: nn.Module,
    inputs: Sequence[Inputs],
    steps: int = STEPS,
    *,
    compute: Compute = CPU,
    note: Callable[[str], None] = _log.warning,
) -> nn.Module:
    """Returns a copy whose convolutions without groups and linear layers hold multiples of a step per output channel.

    The step is the row's largest absolute weight over `steps`, and the largest weight stays what it is, so that a quantizer which
    takes its scales from there changes nothing any more. Zeros stay zeros. A BatchNorm behind the layer may be folded in later:
    it scales whole rows.

    Args:
        module: eval mode, any forward pass that takes the inputs.
        inputs: batches of network inputs, tensors or arrays, to calibrate with; the first `SAMPLES` are used.
        steps: to either side of zero.
        compute: its device is used.
        note: told which layers are left to be rounded to the nearest value.

    Raises:
        InputError: see `curvature.local_hessian`.
    """
    rounded = copy.deepcopy(module).eval().to(compute.device)
    layers = {
        name: layer
        for name, layer in rounded.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }
    small = {name: layer for name, layer in layers.items() if layer.weight[0].numel() <= LARGEST}
    if wide := layers.keys() - small.keys():
        note(f"Not rounded by GPTQ but to the nearest value: {', '.join(sorted(wide))} (more than {LARGEST} inputs each).")
    images, left = [], SAMPLES
    for block in inputs:
        part = pytree.tree_map(lambda t, most=left: torch.as_tensor(t[:most]), block)
        images.append((part, torch.zeros(count_of(part), dtype=torch.long)))
        left -= count_of(part)
        if left <= 0:
            break
    with torch.no_grad():
        # None where all are small: a layer that is asked for by name has to be called
        for name, hessian in local_hessian(rounded, images, None if len(small) == len(layers) else small).items():
            layer = small.get(name)
            if layer is not None:
                layer.weight.copy_(round_rows(layer.weight.flatten(1), hessian, steps).view_as(layer.weight))
    return rounded.to(next(module.parameters()).device)


def round_rows(weight: Tensor, hessian: Tensor, steps: int = STEPS) -> Tensor:
    """Returns each row rounded by GPTQ: multiples of the row's step that change the layer's outputs least, column after column.

    Columns whose inputs are largest come first; what a column loses goes to those after it, `w -= e U_jk / U_jj` with U the upper
    Cholesky factor of the inverse Hessian (GPTQ, section 3.3). A row that ends worse than rounded to the nearest is rounded so.

    Args:
        weight: (rows, k).
        hessian: (k, k), the mean of x x^T over the layer's inputs.
        steps: to either side of zero.
    """
    rows = weight.double()
    largest, top = rows.abs().max(1, keepdim=True)
    step = torch.where(largest > 0, largest / steps, torch.ones_like(largest))
    nearest = (rows / step).round() * step
    damp = DAMPING * hessian.diagonal().mean()
    if not damp > 0:  # the inputs were all 0
        return nearest.to(weight)
    order = hessian.diagonal().argsort(descending=True)
    place = order.argsort()
    curvature = hessian.double()[order][:, order]
    curvature.diagonal().add_(damp)
    lower, bad = torch.linalg.cholesky_ex(curvature)
    factor, worse = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bad or worse:
        _log.warning("A Hessian of %d inputs has no Cholesky factor: rounded to the nearest value, not by GPTQ.", len(order))
        return nearest.to(weight)
    moving, settled = rows[:, order].clone(), torch.empty_like(rows)
    kept = torch.where((top == order) | (rows[:, order] == 0), rows[:, order], torch.nan)  # the others are NaN
    for j in range(len(order)):
        value = (moving[:, j : j + 1] / step).round().clamp(-steps, steps) * step
        value = torch.where(kept[:, j : j + 1].isnan(), value, kept[:, j : j + 1])
        settled[:, j : j + 1] = value
        moving[:, j + 1 :] -= (moving[:, j : j + 1] - value) / factor[j, j] * factor[j : j + 1, j + 1 :]
    settled = settled[:, place]

    def error(found: Tensor) -> Tensor:
        off = found - rows
        return ((off @ hessian.double()) * off).sum(1, keepdim=True)

    return torch.where(error(settled) <= error(nearest), settled, nearest).to(weight)
