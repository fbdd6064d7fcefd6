"""Chooses the pattern of a run, and the strategy that prunes by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...targets.base import Limits, Target
from ..axes.capture import plain
from ..config import Config
from ..errors import InputError
from ..graph.trace import canonical
from ..network.compute import Compute
from ..options import Pattern
from ..run_folder import Stage
from ..score.connections import ConnectionScores
from ..task.load import Loaded
from ..types import Knob
from .base import Pruning
from .channels import Channels
from .masks import Masks
from .units import Units

ENOUGH = 0.8  # share of the multiply-accumulates that can be pruned from which a traced network is not captured again


@dataclass(frozen=True)
class TracedCheck:
    """The result of `Channels.fault`."""

    fault: str


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
    check: Stage | None = None,
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
        check: stores whether a traced network passed its check, so that a resumed run does not export it again.

    Raises:
        InputError: nothing in the network can be pruned so.
    """
    if pattern is Pattern.CHANNEL:
        return _structured(loaded, limits, config, compute, check)
    if not loaded.subject.signature.is_image_classifier:
        raise InputError(f"--pattern {pattern}", found="a recipe", expected="--pattern channel", do="leave it out")
    image_shape = loaded.subject.signature.image_shape
    module, notes = plain(loaded.module)
    net = canonical(module, image_shape)
    scores = ConnectionScores(net, inputs, config.score, config.seed, compute)
    return Masks(net, image_shape, pattern, scores, root, inputs, compute, notes)


def too_narrow(knobs: Sequence[Knob], limits: Limits, led: str) -> list[str]:
    """A remark on groups too narrow for kept counts that suit every target, if there are any; `led` is searched for."""
    shared, own = limits.shared_multiple, limits.channel_multiple
    wide = [knob for knob in knobs if knob.kind in ("inner", "coupled", "channel", "stream", "mlp")]
    narrow = [knob for knob in wide if shared > own and limits.step(knob.size) == own and any(n % shared for n in knob.kept)]
    if not narrow:
        return []
    return [
        f"{len(narrow)} of {len(wide)} groups are narrower than {4 * shared} units: multiples of {own} of them stay, which suits"
        f" {led}; kernels of other targets work in multiples of {shared}, and may gain less."
    ]


def _structured(loaded: Loaded, limits: Limits, config: Config, compute: Compute, check: Stage | None) -> Pruning:
    """By channels of the traced image classifier; else, or where most of that is kept, by units of the exported network."""
    how = config.score, config.seed, compute
    signature = loaded.subject.signature
    traced = _traced(loaded, limits, how, check) if signature.is_image_classifier else None
    if isinstance(traced, Channels) and traced.prunable_macs_share >= ENOUGH:
        return traced
    try:
        units = Units(loaded.module, loaded.example, signature, limits, *how)
    except InputError as error:
        if isinstance(traced, Channels):
            return traced
        if isinstance(traced, InputError) and "cannot be traced" not in traced.what:
            raise traced from error
        raise error from (traced if isinstance(traced, InputError) else None)
    if isinstance(traced, Channels) and traced.prunable_macs_share >= units.prunable_macs_share:
        return traced
    if isinstance(traced, str):
        units.notes += (f"Not pruned by its traced layers: {traced}",)
    return units


def _traced(loaded: Loaded, limits: Limits, how: tuple[str, int, Compute], check: Stage | None) -> Channels | InputError | str:
    """Channels of the traced network; or why it cannot be traced, or why its candidates cannot be built."""
    shape = loaded.subject.signature.image_shape
    try:
        module, notes = plain(loaded.module)
        channels = Channels(canonical(module, shape), shape, limits, *how, notes)
    except InputError as error:
        return error
    found = TracedCheck(channels.fault()) if check is None else check.once(TracedCheck, lambda: TracedCheck(channels.fault()))
    return found.fault or channels
