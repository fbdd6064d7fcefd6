"""Chooses the pattern of a run, and the strategy that prunes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, fx

from ...targets.base import Limits, Target
from ..compute import Compute
from ..config import Config
from ..errors import InputError
from ..score.connections import ConnectionScores
from ..types import Pattern
from .base import Pruning
from .channels import Channels
from .masks import Masks


def pattern_for(config: Config, targets: list[Target]) -> Pattern:
    """The pattern asked for, or for "auto" what buys latency on the first target.

    Raises:
        InputError: a target cannot use it, or the precision asked for; or for masks the size is limited, which they do not
            change, or the budget is in milliseconds, where it is on density.
    """
    pattern = config.pattern or targets[0].limits.patterns[0]
    for target in targets:
        if pattern not in target.limits.patterns:
            able = ", ".join(target.limits.patterns)
            raise InputError(f"--pattern {pattern} with --target {target.name}", expected=f"one of {able}")
        if config.precision is not None and config.precision not in target.limits.precisions:
            able = ", ".join(target.limits.precisions)
            raise InputError(f"--precision {config.precision} with --target {target.name}", expected=f"one of {able}")
    if config.mask == "dynamic" and pattern is not Pattern.WEIGHT:
        raise InputError(f"--mask dynamic with --pattern {pattern}", expected="--pattern weight", do="leave it out")
    if pattern is not Pattern.CHANNEL and config.max_size is not None:
        raise InputError(
            f"--max-size with --pattern {pattern}",
            expected="--pattern channel: the zeros of a mask are stored",
            do="leave one of them out",
        )
    if pattern is not Pattern.CHANNEL and config.latency_budget.ratio is None:
        raise InputError(
            f"--latency-budget with --pattern {pattern}",
            found=str(config.latency_budget),
            expected="the share of connections that may stay, such as 0.5: the zeros of a mask buy no latency",
        )
    return pattern


def pruning_for(
    pattern: Pattern,
    net: fx.GraphModule,
    image_shape: tuple[int, int, int],
    limits: Limits,
    config: Config,
    inputs: Callable[[], Tensor],
    root: Path,
    compute: Compute,
) -> Pruning:
    """Returns the strategy that prunes by a pattern.

    Args:
        pattern: what is removed.
        net: canonical dense network, eval mode.
        image_shape: (C, H, W).
        limits: of the target that is searched for.
        config: its score and seed are used.
        inputs: gives training images (n, C, H, W), augmented; asked for when connections have to be scored.
        root: the run folder.
        compute: where scoring and reconstruction run.

    Raises:
        InputError: nothing in the network can be pruned so.
    """
    if pattern is Pattern.CHANNEL:
        return Channels(net, image_shape, limits, config.score, config.seed, compute)
    scores = ConnectionScores(net, inputs, config.score, config.seed, compute)
    return Masks(net, pattern, scores, root, inputs, compute)
