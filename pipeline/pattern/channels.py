"""Pattern `channel`: whole channels and residual blocks are removed, and the network gets smaller."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from ...targets.base import Limits, Prober, Target
from ..errors import BuildError
from ..evaluate.candidate_graph import CandidateGraph
from ..evaluate.channel_evaluator import StitchedEvaluator
from ..evaluate.evaluation_context import Bench
from ..finetune.dynamic_masks import Remask
from ..graph.coupling import couple
from ..graph.knobs import knobs_for, plan_for
from ..graph.surgery import check_equivalence, prune
from ..network.calling import Inputs
from ..network.compute import CPU, Compute
from ..options import Precision
from ..reconstruct.memory import widest_activation
from ..reconstruct.reconstruction import sequential
from ..run_folder import Stage
from ..score.ranking import rank_units
from ..search.problem import Levels
from ..search.search import FINALISTS
from ..signature import image_signature
from ..types import Plan, Sensitivity
from .base import RankedEvaluator


class Channels:
    """Channels and residual blocks go; the budget is on measured latency."""

    limits = "latency"
    finalists = FINALISTS

    def __init__(
        self,
        net: fx.GraphModule,
        image_shape: tuple[int, int, int],
        limits: Limits,
        score: str,
        seed: int,
        compute: Compute = CPU,
        notes: Sequence[str] = (),
    ) -> None:
        self.compute, self.notes = compute, tuple(notes)
        self.net, self.image_shape, self.score, self.seed = net, image_shape, score, seed
        self.coupling = couple(net)
        self.knobs = knobs_for(self.coupling, limits)
        self.widest = widest_activation(net)

    @cached_property
    def candidates(self) -> CandidateGraph:
        """The exported graph that candidates are cut from, see `evaluate.candidate_graph`."""
        return CandidateGraph(self.net, self.image_shape)

    def fault(self) -> str:
        """Returns why candidates of this network cannot be built, "" if they can.

        The exported graph must give the network's outputs, and pruning random units of every group must equal masking them.
        """
        generator = torch.Generator().manual_seed(self.seed)
        order = {k.name: tuple(torch.randperm(k.size, generator=generator).tolist()) for k in self.knobs}
        deepest = tuple(len(k.kept) - 1 if k.kind != "block" else 0 for k in self.knobs)
        blocks = tuple(i % 2 if k.kind == "block" else 0 for i, k in enumerate(self.knobs))
        try:
            for levels in (deepest, blocks):
                check_equivalence(self.net, self.coupling, plan_for(self.knobs, levels, order, ""), self.image_shape)
            assert self.candidates
        except BuildError as error:
            return str(error)
        return ""

    @property
    def prunable_macs_share(self) -> float:
        """Share of the multiply-accumulates in layers that some knob makes cheaper."""
        return self.coupling.prunable_macs_share

    def measures_precision(self, target: Target) -> bool:
        """Whether processors without dot-product instructions may run int8 convolutions more slowly than float ones."""
        return target.int8_may_be_slower

    def prober(self, target: Target, precision: Precision) -> Prober:
        """The dense graph, cut to each structure."""
        return target.prober(self.net, image_signature(self.image_shape), precision)

    def evaluator(self, bench: Bench) -> RankedEvaluator:
        """See `evaluate.channel_evaluator`."""
        return _ChannelEvaluator(self, bench)

    def plan(self, levels: Levels, ranking: Sensitivity, before: Stage) -> Plan:
        """Of each group the highest-scored units stay. There are no files."""
        return plan_for(self.knobs, levels, ranking.order, self.score)

    def solved(self, plan: Plan, inputs: Inputs) -> fx.GraphModule:
        """See `reconstruction.sequential`.

        Raises:
            BuildError: the pruned network is not the masked one.
        """
        check_equivalence(self.net, self.coupling, plan, self.image_shape)
        return sequential(self.net, self.coupling, plan, inputs, compute=self.compute)

    def blank(self, plan: Plan) -> fx.GraphModule:
        """The network without the plan's channels and blocks."""
        return prune(self.net, self.coupling, plan)

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
        """The share of the network that can be pruned; below one half also what keeps most of the rest; branches that stay."""
        coupling, share = self.coupling, self.prunable_macs_share
        told = [
            f"{share:.0%} of the multiply-accumulates are in layers that get cheaper when channels are removed.",
            *self.notes,
        ]
        if share < 0.5:
            told += [
                f"{lock.operation} in {lock.module or 'the network'} keeps {lock.macs_share:.0%} of them and"
                f" {lock.channels} channels: {lock.reason}."
                for lock in coupling.locked[:3]
            ]
        told += [
            f"{name.removeprefix('block:')}: its residual branch stays, {why}." for name, why in coupling.locked_blocks.items()
        ]
        return tuple(told)


class _ChannelEvaluator(StitchedEvaluator):
    def __init__(self, way: Channels, bench: Bench) -> None:
        super().__init__(way.net, way.coupling, way.knobs, {}, way.candidates, bench)
        self._way = way

    def rank(self, lambda_: float | None) -> Sensitivity:
        way = self._way
        return rank_units(way.net, way.coupling, way.knobs, self, self.bench.inputs, way.score, lambda_, way.seed, way.compute)

    def follow(self, ranking: Sensitivity) -> None:
        self.order = ranking.order
        self.fill_table()
