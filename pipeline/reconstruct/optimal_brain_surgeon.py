"""OBS saliency: what each connection costs to remove, by Optimal Brain Surgeon on the layer's own Hessian.

For a layer that has to give targets T from inputs X, with G = X X^T and C = T X^T, the best weights on a support K are
W_K = C_K (G_KK)^-1, and taking connection p of an output away raises that output's squared error by

    w_p^2 / [(G_KK)^-1]_pp

with all others re-fit (Hassibi & Stork 1993, equation 5; one output at a time: Optimal Brain Compression, Frantar & Alistarh
2022, arXiv 2208.11580). Connections go in rounds, a share of what is left at a time, and the inverse is recomputed after each.
A layer's error counts by how far it moves the logits (`output_curvature`), which makes the costs of different outputs, and to
first order those of different layers, one currency.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from ..network.compute import CPU, Compute
from ..network.exact_mode import exact_arithmetic
from ..network.modes import borrowed
from ..score.layer_inputs import positions_last
from .least_squares import DAMPING
from .sequential import Choose, sequential_masked

_log = logging.getLogger(__name__)

ROUND = 0.15  # share of an output's remaining connections that goes before its inverse is recomputed
LAST = 0.01  # of an output's connections; the rest goes in one round
MOST_WORK = 2e12  # outputs x inputs^3 of a layer that is chosen by OBS saliency, a minute or two; larger ones keep their masks
CURVATURE_IMAGES = 1000  # for `output_curvature`


def removal_costs(gram: Tensor, target: Tensor, *, damping: float = DAMPING, share: float = ROUND) -> Tensor:
    """Returns the OBS saliency of each connection when its turn to be removed comes.

    Args:
        gram: (k, k) X X^T.
        target: (outputs, k) T X^T.
        damping: share of the mean diagonal added to the diagonal.
        share: of an output's remaining connections, removed in one round.

    Returns:
        (outputs, k) float64, in the units of the squared error. Rising along each output's order of removal: what lies above
        any bound is a support that was reached on the way.
    """
    k = len(gram)
    unit = float(gram.diagonal().double().mean().clamp_min(1e-12))
    damped = (gram.double() / unit).float()  # only an order comes of it: half the time, and weights are solved in float64 after
    damped.diagonal().add_(max(damping, 1e-6))
    wanted = (target.double() / unit).float()
    costs = torch.zeros(wanted.shape, dtype=torch.float64, device=gram.device)
    whole = _inverse(damped)  # the same for all outputs, and the largest
    for row in range(len(wanted)):
        left, floor, inverse = torch.arange(k, device=gram.device), 0.0, whole
        while True:
            saliency = (inverse @ wanted[row, left]).square() / inverse.diagonal()
            count = len(left) if len(left) <= max(1.0, LAST * k) else max(1, int(share * len(left)))
            cheapest = saliency.topk(count, largest=False)
            rising = cheapest.values.double().clamp_min(floor)
            costs[row, left[cheapest.indices]] = rising
            floor = float(rising[-1])
            stays = torch.ones_like(left, dtype=torch.bool)
            stays[cheapest.indices] = False
            left = left[stays]
            if not len(left):
                break
            inverse = _inverse(damped[left[:, None], left])
    return costs * unit


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse of a positive definite matrix; in float64 where float32 does not see that it is."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return torch.cholesky_inverse(factor)
    inverse: Tensor = torch.linalg.pinv(matrix.double(), hermitian=True)
    return inverse.to(matrix)


def output_curvature(net: nn.Module, inputs: Tensor, *, seed: int = 0, batch: int = 100) -> dict[str, Tensor]:
    """Returns how much the logits move when a layer's outputs do, per output channel.

    With g the gradient of v . logits, v ~ N(0, I), it is E[g^2], summed over positions: the diagonal of the Gauss-Newton matrix
    of half the squared logit error with respect to the outputs. It needs no labels and does not vanish where the network is
    sure of itself, as the cross-entropy's does on images it was trained on.

    Args:
        net: eval mode.
        inputs: (n, C, H, W); moved to the network's device.
        seed: of v.
        batch: images in one backward pass.

    Returns:
        Layer name -> (outputs,) float64, the mean over images. A layer that is not used gets zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    place = next(net.parameters())
    sums = {name: torch.zeros(len(m.weight), dtype=torch.float64, device=place.device) for name, m in layers.items()}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(gradient: Tensor) -> None:
            sums[name] += positions_last(layers[name], gradient).double().square().sum((0, 2))

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with borrowed(net), exact_arithmetic(place.device.type):
            net.eval()
            for part in torch.split(inputs, batch):
                leaf = part.detach().to(place, copy=True).requires_grad_()
                logits = net(leaf.clone())  # a clone: networks may normalise their input in place
                direction = torch.randn(logits.shape, generator=generator).to(logits)
                torch.autograd.grad((direction * logits).sum(), leaf)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / max(len(inputs), 1) for name, value in sums.items()}


def chooser(curvature: Mapping[str, Tensor], share: float = ROUND) -> Choose:
    """For `sequential_masked`: of each layer as many connections stay as its mask has, those of the highest OBS saliency.

    Args:
        curvature: layer -> (outputs,), weight of each output's error, see `output_curvature`.
        share: see `removal_costs`.
    """

    def choose(name: str, mask: Tensor, gram: Tensor, target: Tensor) -> Tensor:
        costs = removal_costs(gram, target, share=share) * curvature[name].to(gram).double()[:, None]
        return highest(costs, int(mask.count_nonzero()))

    return choose


def chosen_masks(
    net: nn.Module,
    masks: Mapping[str, Tensor],
    images: Tensor,
    *,
    fixed: Collection[str] = (),
    seed: int = 0,
    compute: Compute = CPU,
) -> dict[str, Tensor]:
    """Returns masks with as many connections of each layer, those of the highest OBS saliency on the pruned network's inputs.

    Layers whose inverses would take too long (`MOST_WORK`) keep their masks.

    Args:
        net: dense network with plain weights, eval mode.
        masks: layer -> True where a connection stays, in the weight's shape.
        images: training images (n, C, H, W), augmented.
        fixed: layers that stay as they are.
        seed: of `output_curvature`.
        compute: its device and memory are used.
    """
    with borrowed(net, compute.device):
        by_saliency, found = chooser(output_curvature(net, images[:CURVATURE_IMAGES], seed=seed)), dict(masks)

    def choose(name: str, mask: Tensor, gram: Tensor, target: Tensor) -> Tensor:
        if bool(mask.all()):
            return mask
        if len(mask) * float(len(gram)) ** 3 > MOST_WORK:
            _log.warning("%s: too large for OBS saliency (%d inputs): its mask stays by the score.", name, len(gram))
            return mask
        chosen = by_saliency(name, mask, gram, target)
        found[name] = chosen.view(masks[name].shape)
        return chosen

    sequential_masked(net, masks, images, fixed=fixed, choose=choose, compute=compute)
    return found


def highest(costs: Tensor, count: int) -> Tensor:
    """Mask of the `count` connections of a layer that cost most to remove: bool, in the shape of `costs`."""
    mask = torch.zeros(costs.numel(), dtype=torch.bool)
    mask[costs.flatten().argsort(descending=True, stable=True)[:count].cpu()] = True
    return mask.view(costs.shape)
