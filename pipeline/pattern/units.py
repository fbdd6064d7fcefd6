"""Pattern `channel` for networks captured by torch.export: channels, MLP units, heads, their dimensions and branches go.

The user's own module is cut, trained and built. Candidates are timed as files that the target's converter makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ...targets.base import Limits, Prober, Target
from ..axes.capture import capture
from ..axes.coupling import Plan as Gone
from ..axes.coupling import couple
from ..axes.cutting.gate import Checked, check
from ..axes.cutting.surgery import cut
from ..axes.program import part_of
from ..errors import InputError
from ..evaluate.evaluation_context import Bench
from ..evaluate.unit_evaluator import UnitEvaluator, UnitProber, removed
from ..finetune.dynamic_masks import Remask
from ..graph.knobs import kept_counts, plan_for
from ..network.calling import Inputs
from ..network.compute import CPU, Compute
from ..options import Precision, Score
from ..reconstruct.memory import SOLVING_BYTES
from ..reconstruct.units import sequential
from ..run_folder import Stage
from ..score.layer_moments import LayerMoments
from ..score.unit_saliency import unit_saliency
from ..search.problem import Levels
from ..search.search import FINALISTS
from ..signature import Signature
from ..types import Knob, Plan, Sensitivity
from .base import RankedEvaluator

MOMENT_SAMPLES = 500  # the second moments of layers' inputs are taken on
WHOLE = ("head", "group")  # kinds of which any number may stay; of others a multiple that kernels like
DIMENSIONS = 4  # of queries, keys or values: kept counts are multiples of it


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
        self.notes = captured.notes
        self._said: list[str] = []  # while candidates were made
        self.widest = max(
            math.prod(n.meta["val"].shape[1:]) for n in captured.graph.nodes if isinstance(n.meta.get("val"), Tensor)
        )
        coupling = self.checked.coupling
        self.sizes = {g.name: len(g.units) for g in coupling.groups}
        block_of = {group: block.name for block in coupling.blocks for group in block.groups}
        groups = (knob_of(g.name, g.kind, len(g.units), limits, block_of.get(g.name)) for g in coupling.paying_groups())
        self.knobs = (*(k for k in groups if k is not None), *(Knob(b.name, "block", 1, (1, 0)) for b in coupling.blocks))
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
                else "no group of units",
                do="edge-compress inspect lists what keeps each part",
            )

    @property
    def prunable_macs_share(self) -> float:
        """Share of the multiply-accumulates in operators that some knob makes cheaper."""
        coupling = self.checked.coupling
        return sum(c.macs for c in coupling.walk.costs if coupling.prunable(c)) / max(coupling.macs, 1)

    def measures_precision(self, target: Target) -> bool:
        """Always: attention is often slower in int8."""
        return True

    def prober(self, target: Target, precision: Precision) -> Prober:
        """See `evaluate.unit_evaluator`."""
        return UnitProber(self.checked, target, self.signature, precision, self._said.append)

    def evaluator(self, bench: Bench) -> RankedEvaluator:
        """See `evaluate.unit_evaluator`."""
        return _Evaluator(self, _moments(self, bench), bench)

    def plan(self, levels: Levels, ranking: Sensitivity, before: Stage) -> Plan:
        """Of each group the highest-scored units stay. There are no files."""
        return self.plan_for(levels, ranking.order)

    def plan_for(self, levels: Levels, order: Mapping[str, tuple[int, ...]]) -> Plan:
        """The plan of a setting under an order of each group's units, highest score first."""
        return plan_for(self.knobs, levels, order, self.score)

    def solved(self, plan: Plan, inputs: Inputs) -> nn.Module:
        """See `reconstruct.units.sequential`."""
        return sequential(
            self.checked.coupling, self._gone(plan), self.checked.sized, inputs, compute=self.compute, valid=tokens(inputs)
        )

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
        return 1.0 - sum(p.numel() for p in student.parameters()) / sum(p.numel() for p in dense.parameters())

    def remarks(self, runtime: str) -> tuple[str, ...]:
        """How the network was captured, the share that can be pruned, and below one half what keeps most of the rest."""
        coupling, share = self.checked.coupling, self.prunable_macs_share
        told = [
            "Captured by torch.export; candidates answered in float, in torch.",
            f"{share:.0%} of the multiply-accumulates are in operators that get cheaper when units are removed.",
            *self.notes,
            *dict.fromkeys(self._said),
        ]
        if share < 0.5:
            told += [
                f"{lock.operation} in {lock.module or 'the network'} keeps {lock.macs / max(coupling.macs, 1):.0%} of them:"
                f" {lock.reason}."
                for lock in coupling.locked()[:3]
            ]
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


def _moments(way: Units, bench: Bench) -> LayerMoments:
    inputs = part_of(bench.inputs, 0, MOMENT_SAMPLES)
    return LayerMoments(way.checked.coupling, inputs, way.compute, tokens(inputs))


class _Evaluator(UnitEvaluator):
    def __init__(self, way: Units, moments: LayerMoments, bench: Bench) -> None:
        super().__init__(way.checked, way.knobs, lambda levels: way.plan_for(levels, self._order), moments, bench)
        self._way, self._moments = way, moments
        self._order: Mapping[str, tuple[int, ...]] = {k.name: tuple(range(k.size)) for k in way.knobs}

    def rank(self, lambda_: float | None) -> Sensitivity:
        way = self._way
        if lambda_ not in (None, 1.0) and way.score == Score.HASA:
            raise InputError("--lambda", found=str(lambda_), expected="auto or 1: OBS saliency has no exponent of the curvature")
        scores = unit_saliency(way.checked.coupling, self._moments, way.score, way.seed)
        order = {name: tuple(found.argsort(descending=True, stable=True).tolist()) for name, found in scores.items()}
        return Sensitivity(way.score, 1.0 if way.score == Score.HASA else 0.0, order)

    def follow(self, ranking: Sensitivity) -> None:
        self._order = ranking.order
        self.fill_table()


def knob_of(name: str, kind: str, size: int, limits: Limits, block: str | None = None) -> Knob | None:
    """The decision on a group; None where the target's limits leave one choice."""
    kept = kept_counts(size, 1 if kind in WHOLE else DIMENSIONS if kind.endswith("_dim") else limits.step(size))
    return Knob(name, kind, size, kept, block) if len(kept) > 1 else None
