"""Damped least squares for one layer: the remaining weights are re-fit so that they absorb what was removed.

For a layer with weights W (rows = outputs) and inputs X (columns = positions), the Hessian of the output error |(W' - W) X|^2 is
the layer-local G = X X^T, and the best weights on a kept support K are the least-squares solution

    W'_K = W_K + (W C_K - W_K G_KK) (G_KK + d I)^-1,   C = X_dense X^T, G = X X^T,   d = damping * mean diag G_KK

(Optimal Brain Surgeon with the layer's own Hessian: Hassibi & Stork 1993; Frantar & Alistarh 2022, arXiv 2208.11580). Against the
dense network's inputs, C = G, each layer can be solved on its own: that is what candidates are stitched from. The chosen plan is
reconstructed sequentially afterwards, see `sequential.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

FEWEST_POSITIONS, MOST_POSITIONS = 25_000, 200_000  # of all samples together that a layer is re-fit on
POSITIONS_PER_INPUT = 40  # between the two
DAMPING = 0.01
_log = logging.getLogger(__name__)


def positions_for(inputs: int) -> int:
    """How many output positions a layer with that many inputs to each output is re-fit on; drawn evenly from all samples.

    Neighbouring positions of a map are correlated: more of them cost time and hardly change the fit.
    """
    return min(MOST_POSITIONS, max(FEWEST_POSITIONS, POSITIONS_PER_INPUT * inputs))


def damping_of(inputs: int, positions: float) -> float:
    """Share of the mean diagonal to add for so many inputs fitted on so many positions.

    With few positions an input, as for short texts, the fit would follow their noise; it is drawn to the weights as they were.
    """
    return DAMPING + inputs / max(positions, 1.0)


def solve_masked(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, *, damping: float = DAMPING) -> torch.Tensor:
    """Least-squares weights on a support of its own for every output.

    Args:
        weight: (outputs, k) dense weights.
        gram: (k, k) X X^T.
        mask: (outputs, k), 1 where a weight stays.
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        (outputs, k) in the dtype of `weight`, solved in float64; exactly zero where the mask is zero.
    """
    g = gram.double()
    return _damped_rows(g, weight.double() @ g, weight.double(), mask, damping).to(weight.dtype)


def _damped_rows(
    gram: torch.Tensor, target: torch.Tensor, before: torch.Tensor, mask: torch.Tensor, damping: float
) -> torch.Tensor:
    """`_damped_solve` of each row of `target` on its own support; rows with the same support are solved at once.

    One factorization after another: stacked they take as long, since each is large enough to fill the processor.
    """
    result = torch.zeros_like(target)
    supports: dict[bytes, list[int]] = {}
    for row, stays in enumerate(mask.bool().cpu()):
        supports.setdefault(stays.numpy().tobytes(), []).append(row)
    for rows in supports.values():
        keep = mask[rows[0]].nonzero().flatten().to(target.device)
        if len(keep):
            where = torch.tensor(rows, device=target.device)[:, None]
            part = gram[keep[:, None], keep]
            result[where, keep] = _damped_solve(part, target[where, keep], before[where, keep], damping)
    return result


def _damped_solve(gram: torch.Tensor, target: torch.Tensor, before: torch.Tensor, damping: float) -> torch.Tensor:
    """The weights W with W gram = target, drawn to those of before by d: where the inputs say little, nothing changes.

    d is raised until the matrix is positive definite.
    """
    missing = target - before @ gram
    diagonal = gram.diagonal().mean().clamp_min(1e-12)
    for attempt in range(8):
        share = damping if attempt == 0 else max(damping, 1e-9) * 10**attempt
        damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * diagonal * share
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return before + torch.cholesky_solve(missing.T, factor).T
    _log.warning("A layer's Hessian (%d inputs) is not positive definite: its weights take one diagonal step instead.", len(gram))
    return before + missing / gram.diagonal().clamp_min(1e-12)


def solve_intercept(
    gram: torch.Tensor,
    cross: torch.Tensor,
    before: torch.Tensor,
    damping: float,
    support: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Weights and, as last column, the constant of each output: cross gram^-1, the damping on the weights only.

    Args:
        gram: (k + 1, k + 1), the last input a constant 1.
        cross: (outputs, k + 1).
        before: (outputs, k) weights that are kept where the inputs say little.
        damping: share of the mean diagonal added to the diagonal.
        support: gives the mask (outputs, k) from the centred moments; None: all inputs are used.
    """
    count = gram[-1, -1].clamp_min(1.0)
    mean_x, mean_t = gram[-1, :-1] / count, cross[:, -1] / count
    centred = gram[:-1, :-1] - count * torch.outer(mean_x, mean_x)
    target = cross[:, :-1] - count * torch.outer(mean_t, mean_x)
    if support is None:
        weight = _damped_solve(centred, target, before, damping)
    else:
        weight = _damped_rows(centred, target, before, support(centred, target), damping)
    return torch.cat([weight, (mean_t - weight @ mean_x)[:, None]], 1)
