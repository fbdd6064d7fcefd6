"""Chooses the pattern of a run, and the strategy that prunes by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from ...targets.base import Limits, Target
from ..axes.capture import capture
from ..config import Config
from ..errors import InputError
from ..network.compute import Compute
from ..options import Pattern
from ..score.connections import ConnectionScores
from ..task.load import Loaded
from ..types import Knob
from .base import Pruning
from .masks import Masks
from .units import Units


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
    signature = loaded.subject.signature
    if pattern is Pattern.CHANNEL:
        return Units(loaded.module, loaded.example, signature, limits, config.score, config.seed, compute)
    if not signature.is_image_classifier:
        raise InputError(f"--pattern {pattern}", found="a recipe", expected="--pattern channel", do="leave it out")
    captured = capture(loaded.module, loaded.example)
    scores = ConnectionScores(captured.module, inputs, config.score, config.seed, compute)
    return Masks(captured, signature, pattern, scores, root, inputs, compute)


def too_narrow(knobs: Sequence[Knob], limits: Limits, led: str) -> list[str]:
    """A remark on groups too narrow for kept counts that suit every target, if there are any; `led` is searched for."""
    shared, own = limits.shared_multiple, limits.channel_multiple
    wide = [knob for knob in knobs if knob.kind in ("channel", "stream", "mlp")]
    narrow = [knob for knob in wide if shared > own and limits.step(knob.size) == own and any(n % shared for n in knob.kept)]
    if not narrow:
        return []
    return [
        f"{len(narrow)} of {len(wide)} groups are narrower than {4 * shared} units: multiples of {own} of them stay, which suits"
        f" {led}; kernels of other targets work in multiples of {shared}, and may gain less."
    ]
