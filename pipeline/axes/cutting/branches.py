"""Leaving residual branches out of the user's own module, whose `forward` stays as it is.

The module that ends a branch gives zero, which changes nothing where it is added; the others of the branch pass on what they are
given, and no one reads it. What a converter makes of such a network has neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..capture import tensors_in
from ..types import Block


class Passed(nn.Module):
    """In the place of a module inside a branch that was left out."""

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """The first tensor it is given."""
        return next(tensors_in((inputs, named)))


class Zero(nn.Module):
    """In the place of the module that ended a branch which was left out."""

    def __init__(self, shape: tuple[int, ...] = (), *, full: bool = False) -> None:
        super().__init__()
        self.shape, self.full = shape, full

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """Zeros of `shape` for each sample of the first tensor given if `full`; else a zero without dimensions."""
        first = next(tensors_in((inputs, named)))
        return first.new_zeros((first.shape[0], *self.shape) if self.full else ())


def leave_out(module: nn.Module, blocks: Iterable[Block]) -> None:
    """Replace the modules of branches, in place."""
    for block in blocks:
        for name in block.modules:
            module.set_submodule(name, Passed().train(module.training))
        module.set_submodule(block.modules[-1], Zero(block.shape, full=block.full).train(module.training))
