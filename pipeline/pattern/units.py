"""Pattern `channel`: channels, MLP units, heads, their dimensions and residual branches go, and the network gets smaller.

The user's own module is cut, trained and built. Candidates are timed as files that the target's converter makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...targets.base import Limits, Prober, Target
from ..axes.capture import capture
from ..axes.coupling import Plan as Gone
from ..axes.coupling import couple
from ..axes.cutting.gate import Checked, check
from ..axes.cutting.surgery import cut
from ..axes.program import Program
from ..axes.types import Unit
from ..errors import InputError
from ..evaluate.evaluation_context import Bench
from ..evaluate.unit_evaluator import UnitEvaluator
from ..evaluate.unit_prober import UnitProber, removed
from ..finetune.dynamic_masks import Remask
from ..network.calling import Inputs
from ..network.compute import CPU, Compute
from ..options import Precision, Score
from ..reconstruct.memory import SOLVING_BYTES, widest_activation
from ..reconstruct.sequential import sequential
from ..run_folder import Stage
from ..score.layer_moments import LayerMoments
from ..score.ranking import UnitScores, ordered, rank_units, scored_by_loss, shares
from ..score.unit_saliency import unit_saliency
from ..search.problem import Levels
from ..search.search import FINALISTS
from ..signature import Signature
from ..types import Plan, Sensitivity
from .base import Note, RankedEvaluator, layer_moments
from .knobs import knobs_for, plan_for

ATTENTION = ("head", "head_dim", "value_dim")  # kinds whose units layers read as parts of tokens


class Units:
    """Units of every kind go; the budget is on measured latency."""

    limits = "latency"
    finalists = FINALISTS

    def __init__(
        self,
        module: nn.Module,
        example: Inputs,
        signature: Signature,
        limits: Limits,
        score: str,
        seed: int,
        compute: Compute = CPU,
    ) -> None:
        self.compute, self.signature, self.score, self.seed = compute, signature, score, seed
        captured = capture(module, example)
        self.checked: Checked = check(couple(captured))
        self.net: nn.Module = captured.module
        self._dense: Program | None = None
        self.notes = captured.notes
        self.widest = widest_activation(captured)
        coupling = self.checked.coupling
        self.sizes = {g.name: len(g.units) for g in coupling.groups}
        self.knobs = knobs_for(coupling, limits)
        if not self.knobs:
            locked, narrow = coupling.locked(), [len(group.units) for group in coupling.paying_groups()]
            if narrow:
                raise InputError(
                    "nothing can be removed from the network",
                    found=f"groups of at most {max(narrow)} units",
                    expected=f"more than {limits.channel_multiple}: kept counts are multiples of that for this target",
                )
            raise InputError(
                "nothing can be removed from the network",
                found=f"{locked[0].operation} in {locked[0].module or 'the network'}: {locked[0].reason}"
                if locked
                else "no convolution, linear layer or attention",
                do="edge-compress inspect lists what keeps each part",
            )

    @cached_property
    def scored(self) -> dict[str, Sequence[Unit]]:
        """The units that are scored, by group."""
        names = {knob.name for knob in self.knobs}
        return {g.name: g.units for g in self.checked.coupling.open_groups() if g.name in names}

    @cached_property
    def by_saliency(self) -> bool:
        """Whether units are scored by OBS saliency, layer by layer; else by what removing them does to a classifier's loss."""
        attention = any(knob.kind in ATTENTION for knob in self.knobs)
        return attention or not self.signature.is_image_classifier or not scored_by_loss(self.net, self.scored)

    @property
    def prunable_macs_share(self) -> float:
        """Share of the multiply-accumulates in operators that some knob makes cheaper."""
        coupling = self.checked.coupling
        return sum(c.macs for c in coupling.walk.costs if coupling.prunable(c)) / max(coupling.macs, 1)

    @property
    def locked(self) -> tuple[str, ...]:
        """See `base.Pruning.locked`."""
        coupling = self.checked.coupling
        most = coupling.locked()[:3] if self.prunable_macs_share < 0.5 else ()
        shares = [lock.macs / max(coupling.macs, 1) for lock in most]
        return tuple(
            f"{lock.operation} in {lock.module or 'the network'} keeps {share:.0%} of them: {lock.reason}."
            for lock, share in zip(most, shares, strict=True)
        )

    def measures_precision(self, target: Target) -> bool:
        """Where attention, which is often slower in int8, is in the network; else where the processor's convolutions may be."""
        return target.int8_may_be_slower or self.by_saliency

    def prober(self, target: Target, precision: Precision, note: Note) -> Prober:
        """See `evaluate.unit_evaluator`."""
        return UnitProber(self.checked, target, self.signature, precision, note)

    def evaluator(self, bench: Bench) -> RankedEvaluator:
        """See `evaluate.unit_evaluator`."""
        return _Evaluator(self, layer_moments(self.net, bench, self.compute, tokens(bench.inputs)), bench)

    def plan(self, levels: Levels, ranking: Sensitivity, before: Stage) -> Plan:
        """Of each group the highest-scored units stay. There are no files."""
        return self.plan_for(levels, ranking.order)

    def plan_for(self, levels: Levels, order: Mapping[str, tuple[int, ...]]) -> Plan:
        """The plan of a setting under an order of each group's units, highest score first."""
        return plan_for(self.knobs, levels, order, self.score)

    def solved(self, plan: Plan, inputs: Inputs) -> nn.Module:
        """See `reconstruct.sequential.sequential`."""
        coupling, sized, dense = self.checked.coupling, self.checked.sized, self._program(inputs)
        return sequential(coupling, self._gone(plan), sized, inputs, dense=dense, valid=tokens(inputs), compute=self.compute)

    def _program(self, inputs: Inputs) -> Program:
        """The dense network's program for inputs of these shapes, captured once for all finalists; it does not hold them."""
        shapes = [t.shape for t in pytree.tree_leaves(inputs)]
        if self._dense is None or [t.shape for t in pytree.tree_leaves(self._dense.captured.example)] != shapes:
            found = Program.of(self.net, inputs).captured
            example = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), found.example)
            self._dense = Program(self.net, replace(found, module=self.net, example=example))
        return self._dense

    def blank(self, plan: Plan) -> nn.Module:
        """The user's module without the plan's units."""
        return cut(self.checked.coupling, self._gone(plan), self.checked.sized)

    def masks(self, plan: Plan) -> dict[str, Tensor]:
        """None: what is removed is gone."""
        return {}

    def remask(self, plan: Plan, teacher: nn.Module, inputs: Inputs, epochs: int) -> Remask | None:
        """None: there are no masks."""
        return None

    def sparsity(self, dense: nn.Module, student: nn.Module) -> float:
        """Share of the dense network's parameters that are gone."""
        own = {name for name, _ in dense.named_parameters()}  # without what stands for zero padding
        stay = sum(p.numel() for name, p in student.named_parameters() if name in own)
        return 1.0 - stay / sum(p.numel() for p in dense.parameters())

    def remarks(self, runtime: str) -> tuple[str, ...]:
        """How the network was captured, the share that can be pruned, and below one half what keeps most of the rest."""
        coupling, share = self.checked.coupling, self.prunable_macs_share
        told = [
            "Units are scored by OBS saliency, layer by layer."
            if self.by_saliency
            else "Units are scored by the curvature of the loss along their removal.",
            f"{share:.0%} of the multiply-accumulates are in operators that get cheaper when units are removed.",
            *self.notes,
        ]
        told += self.locked
        bound = self.compute.memory_bytes
        wide = [n for n, p in self.net.named_parameters() if p.ndim > 1 and SOLVING_BYTES * p[0].numel() ** 2 > bound]
        if wide:
            told.append(f"{len(wide)} layers ({', '.join(wide[:3])}) are not re-fit: their Hessians do not fit in the memory.")
        told += [f"{name} stays: {why}." for name, why in {**coupling.locked_groups, **coupling.locked_blocks}.items()]
        told += [
            f"{b.name}: if it goes, {', '.join(b.unused)} stay in the module unused, because its forward looks at them."
            for b in coupling.blocks
            if b.unused
        ]
        return tuple(told)

    def _gone(self, plan: Plan) -> Gone:
        return removed(plan, self.sizes)


def tokens(inputs: Inputs) -> Tensor | None:
    """Which tokens count (n, tokens), where an input is called `attention_mask`; None: all positions do."""
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    return None if mask is None or mask.ndim != 2 else mask.bool()


class _Evaluator(UnitEvaluator):
    def __init__(self, way: Units, moments: LayerMoments, bench: Bench) -> None:
        super().__init__(way.checked, way.signature, way.knobs, lambda levels: way.plan_for(levels, self._order), moments, bench)
        self._way, self._moments = way, moments
        self._order: Mapping[str, tuple[int, ...]] = {k.name: tuple(range(k.size)) for k in way.knobs}

    def rank(self, lambda_: float | None) -> Sensitivity:
        way = self._way
        if not way.by_saliency:
            scores = UnitScores(way.net, way.scored, self.bench.inputs, way.score, way.seed, way.compute, self.bench.curvature)
            halves = tuple(0 if k.kind == "block" else len(k.kept) // 2 for k in way.knobs)
            within = tuple(0 if k.kind == "stream" else half for k, half in zip(way.knobs, halves, strict=True))
            tried = within if any(within) else halves
            return rank_units(scores, lambda order: self.one_shot(way.plan_for(tried, order)), lambda_)
        if lambda_ not in (None, 1.0) and way.score == Score.HASA:
            raise InputError("--lambda", found=str(lambda_), expected="auto or 1: OBS saliency has no exponent of the curvature")
        found = unit_saliency(way.checked.coupling, self._moments, way.score, way.seed)
        order = ordered(found)
        return Sensitivity(way.score, 1.0 if way.score == Score.HASA else 0.0, order, (), shares(found, order))

    def follow(self, ranking: Sensitivity) -> None:
        self._order = ranking.order
        self.fill_table()
