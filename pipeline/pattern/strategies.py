"""What the patterns do differently: channels make the network smaller, masks put zeros in place. The rest is the same for all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor, fx, nn

from ...targets.base import Limits, Target
from ..config import Config
from ..errors import InputError
from ..evaluate.channel_evaluator import StitchedEvaluator
from ..evaluate.evaluation_context import Bench
from ..evaluate.mask_evaluator import MaskEvaluator
from ..files import atomic_write, file_ref
from ..finetune.dynamic_masks import Remask, dynamic
from ..graph.coupling import couple, residual_branches
from ..graph.knobs import knobs_for, plan_for
from ..graph.mask_knobs import mask_knobs, masks_for, selections
from ..graph.surgery import check_equivalence, prune
from ..reconstruct import least_squares as compensate
from ..reconstruct import optimal_brain_surgeon as obs
from ..reconstruct.memory import affordable
from ..run_folder import Stage
from ..score.connections import ConnectionScores
from ..score.ranking import rank_units
from ..search.problem import Evaluator, Levels
from ..search.search import FINALISTS
from ..types import Knob, Pattern, Plan, Sensitivity


class RankedEvaluator(Evaluator, Protocol):
    """An evaluator that knows, or finds out, which units matter most."""

    def rank(self, lambda_: float | None) -> Sensitivity:
        """Which units matter most; None tunes lambda on the search split."""
        ...

    def follow(self, ranking: Sensitivity) -> None:
        """Go by this ranking; measures and checks what the search builds on."""
        ...


class Pruning(Protocol):
    """One way to prune a canonical network."""

    @property
    def net(self) -> fx.GraphModule:
        """The network, dense."""
        ...

    @property
    def limits(self) -> str:
        """What the budget is on: a key of `env.UNITS`."""
        ...

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The decisions of the search."""
        ...

    @property
    def finalists(self) -> int:
        """How many of the search's best plans are solved whole before one is taken, at most."""
        ...

    def evaluator(self, bench: Bench) -> RankedEvaluator:
        """What the search asks."""
        ...

    def plan(self, levels: Levels, ranking: Sensitivity, before: Stage) -> Plan:
        """The plan of a setting that the stage `before` chose; files that belong to it lie in a stage of their own."""
        ...

    def solved(self, plan: Plan, images: Tensor) -> fx.GraphModule:
        """The planned network, its layers solved one after another on training images (n, C, H, W), augmented."""
        ...

    def blank(self, plan: Plan) -> fx.GraphModule:
        """A network of the planned shape, for weights from a file."""
        ...

    def masks(self, plan: Plan) -> dict[str, Tensor]:
        """Parameter -> 0 where fine-tuning has to leave a zero."""
        ...

    def remask(self, plan: Plan, teacher: nn.Module, images: Tensor, epochs: int) -> Remask | None:
        """For `--mask dynamic`: gives the masks anew after each epoch, see `remask.dynamic`."""
        ...

    def sparsity(self, dense: nn.Module, student: nn.Module) -> float:
        """Share of the dense network's weights that are gone or zero."""
        ...

    def remarks(self, runtime: str) -> tuple[str, ...]:
        """What the report has to say about this way on this runtime."""
        ...


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
) -> Pruning:
    """The way to prune by a pattern.

    Args:
        pattern: what is removed.
        net: canonical dense network, eval mode.
        image_shape: (C, H, W).
        limits: of the target that is searched for.
        config: its score and seed are used.
        inputs: gives training images (n, C, H, W), augmented; asked for when connections have to be scored.
        root: the run folder.

    Raises:
        InputError: nothing in the network can be pruned so.
    """
    if pattern is Pattern.CHANNEL:
        return Channels(net, image_shape, limits, config.score, config.seed)
    return Masks(net, pattern, ConnectionScores(net, inputs, config.score, config.seed), root, inputs)


class Channels:
    """Channels and residual blocks go; the budget is on measured latency."""

    limits = "latency"
    finalists = FINALISTS

    def __init__(self, net: fx.GraphModule, image_shape: tuple[int, int, int], limits: Limits, score: str, seed: int) -> None:
        self.net, self.image_shape, self.score, self.seed = net, image_shape, score, seed
        self.coupling = couple(net)
        self.knobs = knobs_for(self.coupling, limits)

    def evaluator(self, bench: Bench) -> RankedEvaluator:
        """See `evaluate`."""
        return _ChannelEvaluator(self, bench)

    def plan(self, levels: Levels, ranking: Sensitivity, before: Stage) -> Plan:
        """Of each group the highest-scored units stay. There are no files."""
        return plan_for(self.knobs, levels, ranking.order, self.score)

    def solved(self, plan: Plan, images: Tensor) -> fx.GraphModule:
        """See `compensate.sequential`.

        Raises:
            BuildError: the pruned network is not the masked one.
        """
        check_equivalence(self.net, self.coupling, plan, self.image_shape)
        return compensate.sequential(self.net, self.coupling, plan, images)

    def blank(self, plan: Plan) -> fx.GraphModule:
        """The network without the plan's channels and blocks."""
        return prune(self.net, self.coupling, plan)

    def masks(self, plan: Plan) -> dict[str, Tensor]:
        """None: what is removed is gone."""
        return {}

    def remask(self, plan: Plan, teacher: nn.Module, images: Tensor, epochs: int) -> Remask | None:
        """None: there are no masks."""
        return None

    def sparsity(self, dense: nn.Module, student: nn.Module) -> float:
        """Share of the dense network's parameters that are gone."""
        own = {name for name, _ in dense.named_parameters()}  # without what stands for zero padding
        stay = sum(p.numel() for name, p in student.named_parameters() if name in own)
        return 1.0 - stay / sum(p.numel() for p in dense.parameters())

    def remarks(self, runtime: str) -> tuple[str, ...]:
        """Nothing: the numbers say it."""
        return ()


class _ChannelEvaluator(StitchedEvaluator):
    def __init__(self, way: Channels, bench: Bench) -> None:
        super().__init__(way.net, way.coupling, way.knobs, {}, bench)
        self._way = way

    def rank(self, lambda_: float | None) -> Sensitivity:
        way = self._way
        return rank_units(way.net, way.coupling, way.knobs, self, self.bench.inputs, way.score, lambda_, way.seed)

    def follow(self, ranking: Sensitivity) -> None:
        self.order = ranking.order
        # Pruned == masked with every group cut and with every second block out, before anything is built on the graph.
        deepest = tuple(len(k.kept) - 1 if k.kind != "block" else 0 for k in self.knobs)
        blocks = tuple(i % 2 if k.kind == "block" else 0 for i, k in enumerate(self.knobs))
        for levels in (deepest, blocks):
            plan = plan_for(self.knobs, levels, ranking.order, "")
            check_equivalence(self.net, self.coupling, plan, self._way.image_shape)
        self.fill_table()


class Masks:
    """Single connections go: zeros in place. They buy no latency where they are stored densely, so the budget is on density."""

    limits = "density"
    finalists = 1  # of a mask's plans each would need its connections chosen anew before it is solved

    def __init__(
        self, net: fx.GraphModule, pattern: Pattern, scores: ConnectionScores, root: Path, inputs: Callable[[], Tensor]
    ) -> None:
        self.net, self.pattern, self.scores, self.root, self._inputs = net, pattern, scores, root, inputs
        self.knobs = mask_knobs(net, pattern)

    def evaluator(self, bench: Bench) -> RankedEvaluator:
        """See `mask_evaluate`."""
        return MaskEvaluator(self.net, self.pattern, self.knobs, self.scores, bench)

    def plan(self, levels: Levels, ranking: Sensitivity, before: Stage) -> Plan:
        """Which connections of each layer stay: uint8 masks by layer in `masks.safetensors`.

        With the pattern `weight` and the score `hasa` it is those dearest to remove one after another (`obs.chosen_masks`), else
        the highest-scored ones.
        """
        stage = before.run.stage("masks", "2", {"levels": levels, "lambda": ranking.lambda_}, (before.key,))
        plan = stage.result(Plan)
        if plan is None:
            masks = masks_for(self.pattern, self.knobs, levels, self.scores.at(ranking.lambda_))
            if self.pattern is Pattern.WEIGHT and self.scores.name == "hasa":
                images = self._inputs()
                images = images[: affordable(self.net, len(images))]
                masks = obs.chosen_masks(self.net, masks, images, fixed=selections(self.net))
            path = stage.folder / "masks.safetensors"
            atomic_write(path, save({name: mask.to(torch.uint8).contiguous() for name, mask in masks.items()}))
            removed = {k.name: 1.0 - k.kept[level] / k.size for k, level in zip(self.knobs, levels, strict=True)}
            plan = Plan(self.pattern, self.scores.name, thresholds=removed, masks=file_ref(path, self.root))
            stage.finish(plan)
        return plan

    def solved(self, plan: Plan, images: Tensor) -> fx.GraphModule:
        """See `compensate.sequential_masked`."""
        return compensate.sequential_masked(
            self.net, residual_branches(self.net), self._read(plan), images, fixed=selections(self.net)
        )

    def blank(self, plan: Plan) -> fx.GraphModule:
        """The dense network: masks change no shape."""
        return copy.deepcopy(self.net)

    def masks(self, plan: Plan) -> dict[str, Tensor]:
        """The plan's masks; layers that stand for zero padding keep their zeros too."""
        return {f"{name}.weight": mask for name, mask in (selections(self.net) | self._read(plan)).items()}

    def remask(self, plan: Plan, teacher: nn.Module, images: Tensor, epochs: int) -> Remask | None:
        """Smallest out, most wanted in; the layers that stand for zero padding keep theirs."""
        own, fixed = ({f"{name}.weight": mask for name, mask in m.items()} for m in (self._read(plan), selections(self.net)))
        return dynamic(own, fixed, teacher, images, epochs)

    def sparsity(self, dense: nn.Module, student: nn.Module) -> float:
        """Share of the dense network's parameters that are zero in the student."""
        own = {name for name, _ in dense.named_parameters()}  # without what stands for zero padding
        found = [p.detach() for name, p in student.named_parameters() if name in own]
        return sum(int((p == 0).sum()) for p in found) / sum(p.numel() for p in found)

    def remarks(self, runtime: str) -> tuple[str, ...]:
        """That zeros buy no latency, or on TensorRT that two of four may."""
        if runtime == "tensorrt" and self.pattern is Pattern.TWO_FOUR:
            return (
                "TensorRT has kernels for two of four; whether they are faster a board decides, kernel by kernel and for the"
                " whole network. The search did not count on it: every candidate has the latency of the dense structure, and the"
                " budget was on density.",
            )
        return (
            f"{runtime} stores the zeros of a mask densely, so they buy no latency: every candidate has the latency of the dense"
            " structure, measured once, and a speedup comes from the artifact's precision alone. The budget was on density.",
        )

    def _read(self, plan: Plan) -> dict[str, Tensor]:
        if plan.masks is None:
            raise ValueError("a plan without masks")
        return load_file(self.root / plan.masks.path)
