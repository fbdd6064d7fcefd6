"""Candidates of a captured network: the user's module cut, re-fit layer by layer, and run in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property

import numpy as np
import onnx
import torch
from torch import nn

from ...targets.base import Estimator, Prober, Structure, Target
from ...targets.onnx.graph import Graph
from ...targets.onnx.prober import OnnxProber
from ...targets.onnx.target import OnnxTarget
from ...targets.tensorrt.prober import JetsonProber
from ..axes.coupling import Coupling
from ..axes.coupling import Plan as Gone
from ..axes.cutting.gate import Checked, enlivened
from ..axes.cutting.surgery import cut, parameter_masks
from ..errors import BuildError, UnavailableError
from ..network.batchnorm import Moments
from ..options import Precision
from ..reconstruct.units import Fitter, stitched
from ..score.layer_moments import LayerMoments
from ..signature import Signature
from ..types import Knob, Plan
from .evaluation_context import Bench
from .exported.unit_graph import UnitGraph
from .table_evaluator import FloatArray, TableEvaluator


class UnitProber:
    """`targets.base.Prober` for structures that count the units left of each group: group -> (units left, units).

    Which units stay does not change what a network costs: the first ones do. Where the target's files are ONNX, candidates are
    cut from one exported graph; where that cannot be done, and for other targets, every candidate is exported.

    Args:
        checked: groups that passed the gate.
        target: that exports the candidates.
        signature: of the network.
        precision: of the artifact.
        note: told why candidates are exported one by one, where an exported graph could not be cut.
    """

    def __init__(
        self, checked: Checked, target: Target, signature: Signature, precision: Precision, note: Callable[[str], None]
    ) -> None:
        self._checked, self._target, self._signature, self._precision = checked, target, signature, precision
        self._note = note
        self._estimates: dict[str, float] = {}  # by structure

    def candidate(self, structure: Structure) -> bytes:
        """A file of this structure in the artifact's precision.

        Raises:
            BuildError: the target's converter refused the cut module.
        """
        found = self._cut(structure)
        if found is not None:
            whole, model = found
            return whole.file_of(model)
        return self._exported(structure).candidate(Structure({}))

    def estimate(self, structure: Structure) -> float:
        """See `targets.base.Estimator`.

        Raises:
            UnavailableError: the target cannot estimate.
        """
        key = structure.key()
        if key not in self._estimates:
            self._estimates[key] = self._seconds(structure) / self.whole_s
        return self._estimates[key]

    @cached_property
    def whole_s(self) -> float:
        """See `targets.base.Estimator`."""
        return self._seconds(Structure({}))

    def _seconds(self, structure: Structure) -> float:
        found = self._cut(structure)
        if found is not None and isinstance(found[0], JetsonProber):
            return found[0].seconds_of(Graph(found[1]))
        prober = self._exported(structure)
        if not isinstance(prober, Estimator):
            raise UnavailableError(f"latencies of target {self._target.name}", found="no device to measure them on")
        return prober.whole_s

    def _cut(self, structure: Structure) -> tuple[OnnxProber, onnx.ModelProto] | None:
        """The whole network's prober, and its graph cut to a structure; None where that cannot be done."""
        if self._graph is None:
            return None
        whole, graph = self._graph
        try:
            return whole, graph.cut(whole.dense, _first_units(structure))
        except BuildError as error:  # a branch whose end was not found
            self._note(f"Some candidates were exported, which takes seconds each: {error}")
            return None

    @cached_property
    def _graph(self) -> tuple[OnnxProber, UnitGraph] | None:
        """The whole network exported, and what cuts it; None where that cannot be done."""
        if not isinstance(self._target, OnnxTarget):
            return None
        with enlivened(self._checked.coupling.walk.captured.module):
            whole = self._exported(Structure({}))
            assert isinstance(whole, OnnxProber)  # of such targets
            try:
                return whole, UnitGraph(self._checked, whole.network)
            except BuildError as error:
                self._note(f"Every candidate was exported, which takes seconds each: {error}")
                return None

    def _exported(self, structure: Structure) -> Prober:
        module = cut(self._checked.coupling, _first_units(structure), self._checked.sized)
        return self._target.prober(module, self._signature, self._precision)

    def macs(self, structure: Structure) -> int:
        """Multiply-accumulates of this structure, batch 1."""
        return sum(macs_left(self._checked.coupling, _first_units(structure)).values())


class UnitEvaluator(TableEvaluator[nn.Module]):
    """Candidates of a captured network. They answer in float; their latency is that of a file in the artifact's precision.

    Args:
        checked: groups that passed the gate.
        knobs: the decisions.
        planned: the plan of a setting.
        moments: of the dense network's layers.
        bench: what candidates are judged with.
    """

    def __init__(
        self,
        checked: Checked,
        knobs: tuple[Knob, ...],
        planned: Callable[[tuple[int, ...]], Plan],
        moments: LayerMoments,
        bench: Bench,
    ) -> None:
        super().__init__(knobs, bench)
        self.checked, self._planned, self._fitter = checked, planned, Fitter(moments)

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

    def score(self, net: nn.Module, structure: Structure) -> tuple[float, float]:
        """See `TableEvaluator.score`."""
        reward = self.bench.reward
        return reward.judge(reward.answers(net))

    def work(self, structure: Structure) -> FloatArray:
        """The multiply-accumulates of each costly operator."""
        coupling = self.checked.coupling
        left = macs_left(coupling, _first_units(structure))
        return np.array([left[k] / max(cost.macs, 1) for k, cost in enumerate(coupling.walk.costs)])

    def stored(self, structure: Structure) -> FloatArray:
        """See `TableEvaluator.stored`."""
        coupling = self.checked.coupling
        plan = _first_units(structure)
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


def removed(plan: Plan, sizes: Mapping[str, int]) -> Gone:
    """Group -> units that go, of a plan that says which stay; of a block that goes its one."""
    units = {name: sorted(set(range(sizes[name])) - set(kept)) for name, kept in plan.kept.items()}
    return units | {name: [0] for name in plan.removed_blocks}


def macs_left(coupling: Coupling, plan: Gone) -> dict[int, int]:
    """Multiply-accumulates of each costly operator, by its number, without a plan's units."""
    gone = coupling.gone(plan)
    absent = {k for block in coupling.left_out(plan) for k in block.operators}
    found = {}
    for number, cost in enumerate(coupling.walk.costs):
        kept = (
            0.0
            if number in absent
            else math.prod(float(mask.mean()) for mask in (coupling.kept(axis, gone) for axis in cost.axes))
        )
        found[number] = round(cost.macs * kept)
    return found


def _first_units(structure: Structure) -> Gone:
    units = {group: range(left, size) for group, (left, size) in structure.widths.items() if left < size}
    return units | dict.fromkeys(structure.removed, range(1))
