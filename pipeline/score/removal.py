"""Scores the removal of whole units by the quadratic model of the loss: one number for each channel, not for each connection.

To remove a channel is to set every weight that reads it to zero: a step w -> w - v, with v those weights and nothing else. The
Gauss-Newton matrix G puts its cost at 1/2 v'Gv. The diagonal of G leaves out how the connections of one channel work together,
although they all carry the same activation. v'Gv needs no matrix: on average it is the square of one image's derivative along v
of a loss with random signs (`curvature.probing_loss`), and that derivative is the sum over positions of activation times gradient
where the channel is read (Theis et al. 2018, arXiv 1801.05787; Molchanov et al. 2019, arXiv 1906.10771). A shortcut-coupled
channel is read in many places: their derivatives are added before squaring, so that what cancels between them, or
adds up, counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.types import Unit
from ..network.exact_mode import Batch, checked_logits, counted, finite, steady
from .curvature import probing_loss, sign_generators

TEMPERATURE = 2.0  # a network sure of its training images says there what matters to the few it is not sure of; 2 ranks best
Places = dict[str, dict[str, tuple[Tensor, Tensor]]]  # layer -> group -> (input channels read, units they belong to)


def removal_curvature(
    net: nn.Module, units: Mapping[str, Sequence[Unit]], batches: Sequence[Batch], draws: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """`v'Gv` of every unit, v the weights that read it and G the Gauss-Newton matrix at `TEMPERATURE`.

    The mean over images and draws of the signs. Unbiased, never negative, exact in v's direction (no diagonal, no independence
    is assumed). Costs one forward pass and `draws` backward passes in which no weight gradient is formed.

    Args:
        net: gives logits (N, classes); images must not influence each other.
        units: group -> its units; their slices of weights' inputs are used.
        batches: calibration images; the labels are not used.
        draws: of the loss's signs; each costs one backward pass.
        seed: of the signs.

    Returns:
        Group -> (units,) on the network's device, float64. A unit that nothing reads gets zero.

    Raises:
        InputError: no images, a half-precision network, or a result that is not finite.
    """
    if draws < 1:
        raise ValueError(f"draws {draws} must be positive")
    generators = sign_generators(seed, draws)
    with steady(net) as place:
        places = places_of(net, units, place.device)
        total = {name: torch.zeros(len(of), dtype=torch.float64, device=place.device) for name, of in units.items()}
        images = counted(batches)
        for inputs, _ in batches:
            along: dict[str, Tensor] = {}  # group -> (N, units): each image's derivative along each unit's v
            leaf = inputs.detach().to(place.device, place.dtype).requires_grad_()
            with read_apart(net, places, along):
                logits = checked_logits(net(leaf.clone()))
            for turn in range(draws):
                along.update({name: place.new_zeros(len(inputs), len(of)) for name, of in units.items()})
                torch.autograd.grad(probing_loss(logits, generators[turn], TEMPERATURE), leaf, retain_graph=turn + 1 < draws)
                for name, derivative in along.items():
                    total[name] += derivative.double().square().sum(0)
    return finite({name: value / (images * draws) for name, value in total.items()})


def places_of(net: nn.Module, units: Mapping[str, Sequence[Unit]], device: torch.device) -> Places:
    """Where each unit is read: by which layers, in which of their input channels."""
    modules = dict(net.named_modules())
    sizes = {n: (m.in_channels // m.groups, m.groups) for n, m in modules.items() if isinstance(m, nn.Conv2d)}
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for group, of in units.items():
        for number, unit in enumerate(of):
            for part in unit.slices:
                if part.axis == 1 and isinstance(modules.get(part.layer), nn.Conv2d | nn.Linear):
                    each, count = sizes.get(part.layer, (0, 1))  # a grouped layer's weight counts the inputs of one group
                    channels = [index + each * g for g in range(count) for index in part.indices]
                    pairs.setdefault((part.layer, group), []).extend((channel, number) for channel in channels)
    places: Places = {}
    for (layer, group), found in pairs.items():
        read, numbers = torch.tensor(found, device=device).unbind(1)
        places.setdefault(layer, {})[group] = read, numbers
    return places


@contextmanager
def read_apart(net: nn.Module, places: Places, along: Mapping[str, Tensor]) -> Iterator[None]:
    """While a forward pass runs here, every layer reads its input through a view of its own.

    The gradient of the view is what this layer alone adds to the gradient of the tensor, and is formed by any backward pass. Each
    such pass adds to `along`, group -> (N, units), every image's derivative of what it started from along each unit's v.
    """

    def hook(layer: str, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own = args[0].view_as(args[0])
        linear = isinstance(module, nn.Linear)
        values = own.detach()  # changed in place after use? then autograd refuses the layer's backward pass

        def add(gradient: Tensor) -> None:
            product = (values * gradient).movedim(-1, 1) if linear else values * gradient
            product = product.flatten(2).sum(2) if product.ndim > 2 else product  # (N, C)
            for group, (channels, numbers) in places[layer].items():
                along[group].index_add_(1, numbers, product[:, channels].to(along[group]))

        own.register_hook(add)  # type: ignore[no-untyped-call]
        return (own, *args[1:])

    with ExitStack() as stack:
        for layer in places:
            stack.callback(net.get_submodule(layer).register_forward_pre_hook(partial(hook, layer)).remove)
        yield
