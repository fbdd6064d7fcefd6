"""The paper's finite differences (section 3), which the product does not use: benchmarks and tests compare with them.

gradient_difference   diagonal of the Hessian from differences of the gradient along random sign vectors
local_diagonal        the diagonal of a layer's own Hessian, in the weight's shape
second_difference     the paper's literal difference, one connection a call: the oracle of the tests
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from edge_compress.pipeline.network.exact_mode import Batch, checked_logits, counted, finite, steady, weight_layers
from torch import Tensor, nn


def gradient_difference(
    module: nn.Module, batches: Sequence[Batch], probes: int, step: float = 1e-3, seed: int = 0, *, absolute: bool = False
) -> dict[str, Tensor]:
    """Hessian diagonal by central differences of the gradient: the mean over probes of `v * (g(w + ev) - g(w - ev)) / 2e`.

    v is a random sign vector over all weights, e the step; this is Hutchinson's estimator (Bekas et al. 2007) without a second
    backward pass. Unbiased up to O(e^2); the variance of entry k is sum_{j != k} H_kj^2 / probes, so it ranks well only with
    hundreds of probes. The weights themselves are never written to.

    Args:
        module: gives logits (N, classes).
        batches: calibration images with their true labels.
        probes: sign vectors; each costs two gradients of all batches.
        step: e, in units of the weights.
        seed: of the sign vectors; the same on every device.
        absolute: the mean of `|v * Hv|` instead. That is not the diagonal but a proxy of each row's norm: about
            sqrt(2/pi) * ||H_k||_2. It ranks well with few probes.

    Returns:
        Layer name -> curvature of the weight's shape. A layer the forward pass does not use gets zeros.

    Raises:
        InputError: no images, a half-precision module, shared weights, or a result that is not finite.
    """
    if probes < 1 or not step > 0:
        raise ValueError(f"probes {probes} and step {step} must be positive")
    layers = weight_layers(module)
    generator = torch.Generator().manual_seed(seed)
    with steady(module) as place:
        weights = {_key(name): layer.weight.detach() for name, layer in layers.items()}
        total = {key: torch.zeros_like(w) for key, w in weights.items()}
        images = counted(batches)
        for _ in range(probes):
            signs = {key: (torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w) for key, w in weights.items()}
            product = {key: torch.zeros_like(w) for key, w in weights.items()}  # H v
            for batch in batches:
                # The two gradients of one batch right after each other: no sum over batches is subtracted from another.
                for sign in (1.0, -1.0):
                    shifted = {key: (w + sign * step * signs[key]).requires_grad_() for key, w in weights.items()}
                    gradients = _gradients(module, shifted, batch, place)
                    for key, gradient in gradients.items():
                        product[key].add_(gradient, alpha=sign / (2 * step * images))
            for key, hv in product.items():
                total[key] += hv.abs() if absolute else hv * signs[key]
    return finite({name: total[_key(name)] / probes for name in layers})


def local_diagonal(hessian: Tensor, weight: Tensor) -> Tensor:
    """The diagonal of a `local_hessian` as a curvature of the weight's shape: the same for every output channel of a group."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).reshape(-1, 1, weight[0].numel())  # (groups, 1, k)
    return diagonal.expand(-1, weight.shape[0] // diagonal.shape[0], -1).reshape(weight.shape)


def second_difference(
    module: nn.Module, loss: Callable[[nn.Module], Tensor], layer: str, index: tuple[int, ...], step: float
) -> float:
    """`(L(w + e) - 2 L(w) + L(w - e)) / e^2` of one connection, as the paper writes it.

    Two forward passes a connection, and its rounding error is about 4e-7 * L / e^2 in float32: an oracle for small float64
    networks, nothing else. The weight is put back bit for bit.
    """
    weight = weight_layers(module)[layer].weight
    with steady(module), torch.no_grad():
        before = weight[index].clone()
        values = []
        try:
            for offset in (step, 0.0, -step):
                weight[index] = before + offset
                values.append(float(loss(module)))
        finally:
            weight[index] = before
    return (values[0] - 2 * values[1] + values[2]) / step**2


def _gradients(module: nn.Module, weights: Mapping[str, Tensor], batch: Batch, place: Tensor) -> dict[str, Tensor]:
    """Gradient of the batch's summed loss at other weights; the module's own are not touched."""
    inputs, labels = batch
    images = inputs.to(place.device, place.dtype, copy=True)
    logits = checked_logits(torch.func.functional_call(module, dict(weights), (images,)))
    loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {key: g for key, g in zip(weights, found, strict=True) if g is not None}


def _key(name: str) -> str:
    return f"{name}.weight" if name else "weight"
