"""Whether a cut network runs in training mode, where other lines of a `forward` are run."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...errors import first_line
from ..capture import Example, larger_batch, run, tensors_in
from ..coupling import Coupling, Plan
from .sizes import TIMES, SizedCalls
from .surgery import cut

_IN_TRAINING = "in training mode"
_Shapes = tuple[list[torch.Size], str]
_full: WeakKeyDictionary[nn.Module, dict[tuple[torch.Size, ...], _Shapes]] = WeakKeyDictionary()  # of dense networks, by inputs


def training_fault(coupling: Coupling, plan: Plan, sized: Mapping[str, SizedCalls], example: Example) -> str:
    """Returns how the network without a plan's units fails in training mode; "" where it does not.

    On the example, or on more samples where BatchNorm has one value a channel. Also "" where the full network runs on neither.
    """
    for batch in (example, larger_batch(example, TIMES)):
        expected, fault = _full_shapes(coupling, batch)
        if not fault:
            found, fault = _shapes(coupling, plan, sized, batch)
            return fault if fault or found == expected else f"{_IN_TRAINING}, the outputs change their shape"
    return ""


def _full_shapes(coupling: Coupling, example: Example) -> _Shapes:
    """`_shapes` of the full network, which many plans are compared with."""
    known = _full.setdefault(coupling.walk.captured.module, {})
    inputs = tuple(t.shape for t in tensors_in(example))
    if inputs not in known:
        known[inputs] = _shapes(coupling, {}, {}, example)
    return known[inputs]


def _shapes(coupling: Coupling, plan: Plan, sized: Mapping[str, SizedCalls], example: Example) -> _Shapes:
    """The shapes of what the network without a plan's units gives in training mode, or why it does not run."""
    try:
        with torch.random.fork_rng(devices=[]):
            return [t.shape for t in run(cut(coupling, plan, sized).train(), example)], ""
    except Exception as error:  # the user's forward on sizes, or in a mode, it was not written for
        return [], f"{_IN_TRAINING}, {first_line(error)}"
