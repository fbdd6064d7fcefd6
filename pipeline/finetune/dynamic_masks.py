"""Masks re-chosen during training (the paper's "dynamic").

Rigging the Lottery (Evci et al. 2020, arXiv 1911.11134): of each layer a share of the kept connections, the smallest, is
masked, and as many masked ones, those with the largest gradient, are freed at 0. The share falls to nothing along a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.compute import Compute
from ..network.memory import backward_batch_size

SHARE = 0.3  # of a layer's kept connections, exchanged after the first epoch

Remask = Callable[[int, nn.Module], dict[str, Tensor]]


def drop_and_grow(weight: Tensor, mask: Tensor, gradient: Tensor, share: float) -> Tensor:
    """The bool mask of a layer, a share (in [0, 1]) of its kept connections exchanged by weight and gradient; as many stay."""
    kept = mask.bool().flatten()
    count = min(int(share * int(kept.sum())), int((~kept).sum()))
    if not count:
        return kept.view_as(mask)
    smallest = weight.detach().abs().flatten().masked_fill(~kept, math.inf).topk(count, largest=False).indices
    wanted = gradient.abs().flatten().masked_fill(kept, -1.0).topk(count).indices
    kept[smallest], kept[wanted] = False, True
    return kept.view_as(mask)


def dynamic(
    masks: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    teacher: nn.Module,
    images: Tensor,
    epochs: int,
) -> Remask:
    """For `finetune.finetune`: masks after each epoch.

    The gradient is that of the divergence from the teacher's outputs. A kept weight that has become exactly 0 counts as the
    smallest; which connections are kept is read from the student, so a resumed run chooses as an uninterrupted one.

    Args:
        masks: parameter -> its mask at the start.
        fixed: parameter -> mask that stays.
        teacher: the dense network, eval mode.
        images: (n, C, H, W) training images the gradient is taken on.
        epochs: of the training.
    """
    counts = {name: int(mask.count_nonzero()) for name, mask in masks.items()}

    def remask(epoch: int, student: nn.Module) -> dict[str, Tensor]:
        parameters = {name: student.get_parameter(name) for name in masks}
        place = next(student.parameters()).device
        gradients = {name: torch.zeros_like(weight) for name, weight in parameters.items()}
        for part in torch.split(images, backward_batch_size(student, images, Compute(place.type), len(images))):
            inputs = part.to(place)
            with torch.no_grad():
                wanted = teacher(inputs).softmax(1)
            loss = F.kl_div(student(inputs).log_softmax(1), wanted, reduction="sum") / len(images)
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                gradients[name] += gradient
        now = SHARE * (1.0 + math.cos(math.pi * epoch / max(epochs, 1))) / 2.0
        found = {}
        for name, weight in parameters.items():
            mask = _as_many(weight, gradients[name], counts[name])
            found[name] = drop_and_grow(weight, mask, gradients[name], now)
        return found | dict(fixed)

    return remask


def _as_many(weight: Tensor, gradient: Tensor, count: int) -> Tensor:
    """The connections a student keeps: those that are not 0, and of the others those most wanted, `count` in all."""
    present = weight.detach() != 0
    order = torch.where(present, math.inf, gradient.abs()).flatten()
    mask = torch.zeros_like(present).flatten()
    mask[order.topk(count).indices] = True
    return mask.view_as(present)
