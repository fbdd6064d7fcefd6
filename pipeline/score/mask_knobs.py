"""The decisions of a mask search: how many connections of each layer stay, and their masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..axes.capture import Captured
from ..axes.program import Program
from ..errors import InputError
from ..options import Pattern
from ..types import Knob
from .masks import two_four_fits, two_four_mask, weight_masks

SHARES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)  # of a layer's connections that may stay, pattern `weight`


Levels = tuple[int, ...]


def mask_knobs(captured: Captured, pattern: Pattern, shares: Sequence[float] = SHARES) -> tuple[Knob, ...]:
    """One knob for each layer that can be masked, in the order they run; its units are the layer's connections.

    These are convolutions without groups and linear layers on vectors. Pattern 2:4: half of the connections may go, where the
    inputs come in fours. Pattern `weight`: `shares` of them may stay.

    Raises:
        InputError: no layer can carry the pattern.
    """
    found: list[Knob] = []
    still, modules = selections(captured.module), dict(captured.module.named_modules())
    for layer in Program(captured.module, captured).layers():
        name, own = layer.weight.rpartition(".")[::2]
        module = modules[name]
        plain = isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and layer.node.meta["val"].ndim == 2)
        if name in still or own != "weight" or not plain:
            continue
        weight = captured.module.get_parameter(layer.weight)
        size = weight.numel()
        if pattern is Pattern.TWO_FOUR:
            counts = {size, size // 2} if two_four_fits(tuple(weight.shape)) else {size}
        else:
            counts = {max(1, round(size * share)) for share in shares}
        if len(counts) > 1:
            found.append(Knob(name, "layer", size, tuple(sorted(counts, reverse=True))))
    if not found:
        raise InputError(
            f"pattern {pattern}: nothing can be masked",
            found="no layer that can carry it",
            expected="a convolution or linear layer whose inputs come in fours" if pattern is Pattern.TWO_FOUR else "a layer",
            do="use --pattern channel",
        )
    return tuple(found)


def selections(net: nn.Module) -> dict[str, Tensor]:
    """Layers that only select channels, which stand for zero-padded shortcuts: layer -> 1 where it selects.

    See `axes.rewrites.padding`. They have no connections of their own: they are neither masked nor solved, and their zeros stay
    zeros in training.
    """
    found = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.bias is None:
            weight = layer.weight.detach()
            ones = weight == 1.0
            if bool(((weight == 0.0) | ones).all()) and int(ones.flatten(1).sum(1).max()) <= 1:
                found[name] = ones
    return found


def layer_mask(scores: Tensor, pattern: Pattern, knob: Knob, level: int) -> Tensor:
    """What stays of a layer at a level: bool in the weight's shape, True for the `knob.kept[level]` highest scored."""
    if level == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if pattern is Pattern.TWO_FOUR:
        return two_four_mask(scores)
    return weight_masks({knob.name: scores}, 1.0 - knob.kept[level] / knob.size)[knob.name]


def masks_for(pattern: Pattern, knobs: tuple[Knob, ...], levels: Levels, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a setting: layer -> `layer_mask`."""
    return {k.name: layer_mask(scores[k.name], pattern, k, level) for k, level in zip(knobs, levels, strict=True)}


def density(knobs: tuple[Knob, ...], levels: Levels) -> float:
    """Share of all knobs' connections that stay."""
    return sum(k.kept[level] for k, level in zip(knobs, levels, strict=True)) / sum(k.size for k in knobs)
