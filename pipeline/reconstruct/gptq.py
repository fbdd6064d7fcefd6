"""GPTQ: error-compensating rounding of weights to the grid of an int8 file.

Rounding to the nearest value treats each weight alone; what a layer gets wrong is a sum over correlated inputs. The rule is
that of Optimal Brain Quantization (Frantar and Alistarh 2022, arXiv 2208.11580) in the fixed order of GPTQ (Frantar et al. 2023,
arXiv 2210.17323), on the layer-local Hessian of the pruned network's inputs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..axes.capture import capture
from ..axes.program import part_of
from ..network.calling import Inputs, count_of
from ..network.compute import CPU, Compute
from ..score.curvature import like
from ..score.layer_moments import LayerMoments

_log = logging.getLogger(__name__)
SAMPLES = 100  # for the layer Hessians
DAMPING = 0.01  # share of the mean diagonal added to the diagonal
LARGEST = 5000  # inputs of a layer, kernel included: the columns are rounded one after the other, which takes minutes
STEPS = 127  # of an 8-bit weight to either side of zero
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
        module: any network that can be captured.
        inputs: batches of network inputs, tensors or arrays, to calibrate with; the first `SAMPLES` are used.
        steps: to either side of zero.
        compute: its device is used, within its memory.
        note: told which layers are left to be rounded to the nearest value.

    Raises:
        InputError: see `capture`.
    """
    rounded = copy.deepcopy(module).eval()
    first = next(rounded.parameters())
    samples = like(_first(inputs, SAMPLES), torch.empty(0, dtype=first.dtype))
    plain = capture(copy.deepcopy(rounded).cpu(), part_of(samples, 0, 1)).module
    moments = LayerMoments(plain, samples, compute, most_inputs=LARGEST)
    own, done = dict(rounded.named_parameters()), set[str]()
    with torch.no_grad():
        for name in moments.gram:
            weight = plain.get_parameter(name)
            if name not in own or not torch.equal(own[name].cpu(), weight):  # computed at every call
                continue
            hessian = moments.gram[name][:-1, :-1].to(compute.device)  # without the constant input
            own[name].copy_(round_rows(weight.flatten(1).to(compute.device), hessian, steps).view_as(weight))
            done.add(name)
    left = {f"{n}.weight" for n, m in rounded.named_modules() if isinstance(m, _LAYERS) and getattr(m, "groups", 1) == 1} - done
    _tell(note, left & set(moments.left_out), "their Hessians are too large")
    _tell(note, left - set(moments.left_out), "their weights are shared, computed or not used")
    return rounded


def _first(inputs: Sequence[Inputs], count: int) -> Inputs:
    """The first samples of batches of tensors or arrays, together."""
    parts, left = [], count
    for block in inputs:
        parts.append(pytree.tree_map(lambda t, most=left: torch.as_tensor(t[:most]), block))
        left -= count_of(parts[-1])
        if left <= 0:
            break
    return pytree.tree_map(lambda *tensors: torch.cat(tensors), *parts)


def _tell(note: Callable[[str], None], names: Collection[str], why: str) -> None:
    if names:
        note(f"Not rounded by GPTQ but to the nearest value: {', '.join(sorted(names))} ({why}).")


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
