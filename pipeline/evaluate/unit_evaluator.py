"""Candidates of a captured network: the user's module cut, re-fit layer by layer, and evaluated in the artifact's precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property

import numpy as np
import torch
from torch import nn

from ...targets.base import Structure
from ..axes.cutting.gate import Checked
from ..axes.cutting.surgery import parameter_masks
from ..network.batchnorm import Moments
from ..reconstruct.stitching import Fitter, stitched
from ..score.layer_moments import LayerMoments
from ..signature import Signature
from ..types import Knob, Plan
from .evaluation_context import Bench
from .exported.answering import Int8Answers, int8_answers
from .table_evaluator import FloatArray, TableEvaluator
from .unit_prober import first_units, macs_left, removed


class UnitEvaluator(TableEvaluator):
    """Evaluates candidates of a captured network in the artifact's precision: int8 in ONNX Runtime, float in PyTorch.

    Args:
        checked: groups that passed the gate.
        signature: of the network.
        knobs: the decisions.
        planned: the plan of a setting.
        moments: of the dense network's layers.
        bench: what candidates are judged with.
    """

    def __init__(
        self,
        checked: Checked,
        signature: Signature,
        knobs: tuple[Knob, ...],
        planned: Callable[[tuple[int, ...]], Plan],
        moments: LayerMoments,
        bench: Bench,
    ) -> None:
        super().__init__(knobs, bench)
        self.checked, self._signature, self._planned, self._fitter = checked, signature, planned, Fitter(moments)

    def plan(self, levels: tuple[int, ...]) -> Plan:
        """See `TableEvaluator.plan`."""
        return self._planned(levels)

    def structure(self, plan: Plan) -> Structure:
        """How many units are left of each group that loses any, and the branches left out."""
        return Structure({name: (len(kept), self.sizes[name]) for name, kept in plan.kept.items()}, plan.removed_blocks)

    @cached_property
    def _dense_moments(self) -> Moments:
        return self.bench.reward.dense_moments(self.checked.coupling.walk.captured.module)

    def network(self, plan: Plan) -> nn.Module:
        """See `TableEvaluator.network`; BatchNorm statistics are re-estimated where there are any."""
        coupling = self.checked.coupling
        gone = removed(plan, self.sizes)
        small = stitched(coupling, gone, self.checked.sized, self._fitter).eval()
        if self._dense_moments:
            masks = parameter_masks(coupling, coupling.gone(gone))
            kept = {n.removesuffix(".running_mean"): m[0] for n, m in masks.items() if n.endswith(".running_mean") and 0 in m}
            self.bench.reward.restore(
                small, self._dense_moments, {n: torch.from_numpy(mask.nonzero()[0]) for n, mask in kept.items()}
            )
        return small

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Units of each group in the dense network."""
        return {g.name: len(g.units) for g in self.checked.coupling.groups}

    def score(self, net: nn.Module, plan: Plan) -> tuple[float, float]:
        """See `TableEvaluator.score`."""
        reward, graph = self.bench.reward, self._int8
        if graph is None:
            return reward.judge(reward.answers(net))
        return reward.judge(graph.answers(net, removed(plan, self.sizes), reward.batch.inputs))

    @cached_property
    def _int8(self) -> Int8Answers | None:
        bench = self.bench
        return int8_answers(self.checked, self._signature, bench.reward, bench.precision, bench.note)

    def work(self, structure: Structure) -> FloatArray:
        """The multiply-accumulates of each costly operator."""
        coupling = self.checked.coupling
        left = macs_left(coupling, first_units(structure))
        return np.array([left[k] / max(cost.macs, 1) for k, cost in enumerate(coupling.walk.costs)])

    def macs(self, structure: Structure) -> int:
        """See `TableEvaluator.macs`."""
        return sum(macs_left(self.checked.coupling, first_units(structure)).values())

    def stored(self, structure: Structure) -> FloatArray:
        """See `TableEvaluator.stored`."""
        coupling = self.checked.coupling
        plan = first_units(structure)
        gone = coupling.gone(plan)
        absent = tuple(f"{name}." for block in coupling.left_out(plan) for name in block.modules)
        weights = values = 0.0
        for name, axes in coupling.walk.parameters.items():
            if not name.startswith(absent):
                left = [int(coupling.kept(axis, gone).sum()) for axis in axes]
                weights += math.prod(left) if len(left) > 1 else 0
                values += left[0] if len(left) == 1 else 0
        return np.array([weights, values, float(sum(macs > 0 for macs in macs_left(coupling, plan).values()))])

    def change(self, knob: int, level: int) -> Hashable:
        """Its kind, the share of units left, and the multiply-accumulates of the operators it makes cheaper."""
        at = self.knobs[knob]
        coupling = self.checked.coupling
        left = macs_left(coupling, {at.name: range(at.kept[level], at.size)})
        costs = coupling.walk.costs
        touched = sorted((costs[k].macs, macs) for k, macs in left.items() if macs != costs[k].macs)
        return at.kind, at.size, at.kept[level], tuple(touched)
