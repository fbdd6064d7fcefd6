"""Chooses the pattern of a run, and the strategy that prunes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ...targets.base import Limits, Target
from ..config import Config
from ..errors import InputError
from ..graph.trace import canonical
from ..network.compute import Compute
from ..options import Pattern
from ..score.connections import ConnectionScores
from ..task.load import Loaded
from .base import Pruning
from .channels import Channels
from .masks import Masks
from .units import Units

ENOUGH = 0.8  # share of the multiply-accumulates that can be pruned from which a traced network is not captured again


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
    timed = [budget for budget in config.latency_budget if budget.ratio is None]
    if pattern is not Pattern.CHANNEL and timed:
        raise InputError(
            f"--latency-budget with --pattern {pattern}",
            found=str(timed[0]),
            expected="the share of connections that may stay, such as 0.5: the zeros of a mask buy no latency",
        )
    return pattern


def pruning_for(
    pattern: Pattern,
    loaded: Loaded,
    limits: Limits,
    config: Config,
    inputs: Callable[[], Tensor],
    root: Path,
    compute: Compute,
) -> Pruning:
    """Returns the strategy that prunes by a pattern.

    Args:
        pattern: what is removed.
        loaded: the dense network, an example of its inputs, and its signature.
        limits: of the target that is searched for.
        config: its score and seed are used.
        inputs: gives training images (n, C, H, W), augmented; asked for when connections have to be scored.
        root: the run folder.
        compute: where scoring and reconstruction run.

    Raises:
        InputError: nothing in the network can be pruned so.
    """
    if pattern is Pattern.CHANNEL:
        return _structured(loaded, limits, config, compute)
    if not loaded.subject.signature.is_image_classifier:
        raise InputError(f"--pattern {pattern}", found="a recipe", expected="--pattern channel", do="leave it out")
    image_shape = loaded.subject.signature.image_shape
    net = canonical(loaded.module, image_shape)
    scores = ConnectionScores(net, inputs, config.score, config.seed, compute)
    return Masks(net, image_shape, pattern, scores, root, inputs, compute)


def _structured(loaded: Loaded, limits: Limits, config: Config, compute: Compute) -> Pruning:
    """By channels of the traced image classifier; else, or where most of that is kept, by units of the exported network."""
    how = config.score, config.seed, compute
    module, signature = loaded.module, loaded.subject.signature
    captured = module, loaded.example, signature, limits, *how
    if not signature.is_image_classifier:
        if config.max_size is not None:
            raise InputError("--max-size", found="a recipe", do="leave it out")
        return Units(*captured)
    image_shape = signature.image_shape
    try:
        channels = Channels(canonical(module, image_shape), image_shape, limits, *how)
    except InputError as untraced:
        try:
            units = Units(*captured)
        except InputError as error:
            if "cannot be traced" in untraced.what:
                raise error from untraced
            raise untraced from error
        if config.max_size is not None:
            raise InputError("--max-size", found="a network captured by torch.export", do="leave it out") from untraced
        return units
    if config.max_size is not None or channels.prunable_macs_share >= ENOUGH:
        return channels
    try:
        units = Units(*captured)
    except InputError:
        return channels
    return units if units.prunable_macs_share > channels.prunable_macs_share else channels
