"""BatchNorm statistics of a network whose weights were changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .calling import Inputs, call

FAR = 0.5  # largest median deviation of the means of a layer's channels, in standard deviations, for a match
TWICE = 2.0  # largest median factor between their variances


class Run(NamedTuple):
    """What a BatchNorm layer was given in one of its runs: mean and variance of each channel over so many positions."""

    positions: int
    mean: Tensor
    var: Tensor


Moments = dict[str, list[Run]]  # BatchNorm layer -> its runs in one forward pass, in order


def input_moments(module: nn.Module, inputs: Inputs) -> Moments:
    """The moments of what every BatchNorm layer of a network (eval mode) is given on these inputs."""
    found: Moments = {}
    with _before_norms(module, lambda name, norm, x: found.setdefault(name, []).append(_run(x))), torch.no_grad():
        call(module, inputs)
    return found


def pooled(runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all runs of a layer."""
    positions = sum(run.positions for run in runs)
    shares = [run.positions / positions for run in runs]
    mean = torch.stack([share * run.mean for share, run in zip(shares, runs, strict=True)]).sum(0)
    squares = [share * (run.var + (run.mean - mean).square()) for share, run in zip(shares, runs, strict=True)]
    return mean, torch.stack(squares).sum(0)


def statistics_match_data(module: nn.Module, inputs: Inputs) -> bool:
    """Returns whether the running statistics of a network's BatchNorm layers match its data.

    They do not after BatchNorm folding (mean 0, variance 1), or if they were computed on other data. In train mode, with batch
    statistics, such a network computes another function.

    Args:
        module: the network, eval mode.
        inputs: network inputs, augmented as in training.
    """
    strange = []
    layers = dict(module.named_modules())
    for name, runs in input_moments(module, inputs).items():
        mean, var = pooled(runs)
        norm = layers[name]
        assert isinstance(norm, _BatchNorm)  # _before_norms
        assert norm.running_mean is not None
        assert norm.running_var is not None
        spread = (var + norm.eps).sqrt()
        shifted = ((mean - norm.running_mean).abs() / spread).median() > FAR
        scaled = ((var + norm.eps) / (norm.running_var + norm.eps)).log().abs().median() > math.log(TWICE)
        strange.append(bool(shifted | scaled))
    return 2 * sum(strange) <= len(strange)


def match_moments(module: nn.Module, dense: Moments, inputs: Inputs, kept: Mapping[str, Tensor]) -> None:
    """Set running statistics in place, layer by layer, so that each BatchNorm's output has the dense network's moments.

    With m, v the dense network's input moments and m', v' the module's own, the running mean M and variance V become

        V' + eps = (V + eps) (v' + eps) / (v + eps),   M' = m' - (m - M) sqrt((V' + eps) / (V + eps))

    Where V and M are the data's this is V' = v', M' = m': the usual re-estimation. Where they are not (a BatchNorm that was
    folded into its convolution has M = 0, V = 1), what was not changed still computes what it did. A layer that runs repeatedly
    is matched by its first run: the inputs of the later ones depend on its statistics themselves.

    Args:
        module: the changed network, eval mode, with the dense network's running statistics.
        dense: `input_moments` of the dense network on the same inputs.
        inputs: network inputs on the module's device, augmented as in training.
        kept: BatchNorm layer -> the dense network's channels it still has; a layer that is not named has all.
    """
    matched: set[str] = set()

    def match(name: str, norm: _BatchNorm, x: Tensor) -> None:
        if name in matched:
            return
        matched.add(name)
        assert norm.running_mean is not None  # _before_norms
        assert norm.running_var is not None
        whole, own = dense[name][0], _run(x)
        mean, var = (v if name not in kept else v[kept[name].to(v.device)] for v in (whole.mean, whole.var))
        before = norm.running_var + norm.eps
        after = (before * (own.var + norm.eps) / (var + norm.eps)).clamp_min(norm.eps)
        norm.running_mean.copy_(own.mean - (mean - norm.running_mean) * (after / before).sqrt())
        norm.running_var.copy_(after - norm.eps)

    with _before_norms(module, match), torch.no_grad():
        call(module, inputs)


def _run(x: Tensor) -> Run:
    var, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
    return Run(x.numel() // x.shape[1], mean, var)


@contextmanager
def _before_norms(module: nn.Module, see: Callable[[str, _BatchNorm, Tensor], None]) -> Iterator[None]:
    """Calls `see(name, layer, input)` before each BatchNorm layer with running statistics runs."""
    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
                hook = partial(lambda name, layer, args: see(name, layer, args[0]), name)
                stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield
