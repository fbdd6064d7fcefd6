"""Masks re-chosen while the network trains (the paper's "dynamic"): the least kept connections go, the most wanted come back.

Rigging the Lottery (Evci et al. 2020, arXiv 1911.11134): of each layer a share of the kept connections, the smallest, is
masked, and as many masked ones, those with the largest gradient, are freed at 0. The share falls to nothing along a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.process_group import ALONE, World

SHARE = 0.3  # of a layer's kept connections, exchanged after the first epoch

Remask = Callable[[int, nn.Module], dict[str, Tensor]]


def drop_and_grow(weight: Tensor, mask: Tensor, gradient: Tensor, share: float) -> Tensor:
    """The mask with a share of its connections exchanged: bool, as many stay as before.

    Args:
        weight: of a layer.
        mask: of its shape, not zero where a connection stays.
        gradient: of its shape, of the loss with respect to the weight.
        share: of the connections that stay, in [0, 1].
    """
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
    share: float = SHARE,
    world: World = ALONE,
) -> Remask:
    """For `finetune.finetune`: masks after each epoch.

    The gradient is that of the divergence from the teacher's answers. A kept weight that has become exactly 0 counts as the
    smallest; which connections are kept is read from the student, so a run that goes on chooses as one that was not stopped.

    Args:
        masks: parameter -> its mask at the start.
        fixed: parameter -> mask that stays.
        teacher: the dense network, eval mode.
        images: (n, C, H, W) training images the gradient is taken on.
        epochs: of the training.
        share: exchanged after the first epoch.
        world: whose ranks share the images out; all of them get the gradient over all images, and so the same masks.
    """
    counts = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    part = world.share(len(images))

    def remask(epoch: int, student: nn.Module) -> dict[str, Tensor]:
        parameters = {name: student.get_parameter(name) for name in masks}
        inputs = images[part.start : part.stop].to(next(student.parameters()).device)
        with torch.no_grad():
            wanted = teacher(inputs).softmax(1)
        loss = F.kl_div(student(inputs).log_softmax(1), wanted, reduction="batchmean")
        own = torch.autograd.grad(loss, list(parameters.values()))
        gradients = world.mean(dict(zip(parameters, own, strict=True)), len(part))
        now = share * (1.0 + math.cos(math.pi * epoch / max(epochs, 1))) / 2.0
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
