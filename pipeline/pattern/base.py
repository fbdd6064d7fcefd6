"""The two protocols of a pattern: what the search asks of it, and what every later stage asks of it; what patterns share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor, nn

from ...targets.base import Prober, Target
from ..axes.program import part_of
from ..evaluate.evaluation_context import Bench
from ..finetune.dynamic_masks import Remask
from ..network.calling import Inputs
from ..network.compute import Compute
from ..options import Precision
from ..run_folder import Stage
from ..score.layer_moments import LayerMoments
from ..search.problem import Evaluator, Levels
from ..types import Knob, Plan, Sensitivity

Note = Callable[[str], None]
MOMENT_SAMPLES = 500  # the second moments of layers' inputs are taken on


def layer_moments(net: nn.Module, bench: Bench, compute: Compute, valid: Tensor | None = None) -> LayerMoments:
    """The moments of a dense network's layers, for the search; what the memory did not allow is noted."""
    inputs = part_of(bench.inputs, 0, MOMENT_SAMPLES)
    found = LayerMoments(net, inputs, compute, valid, bench.memo.parent / "moments")
    for remark in found.remarks():
        bench.note(remark)
    return found


class RankedEvaluator(Evaluator, Protocol):
    """An evaluator that knows, or finds out, which units matter most."""

    def rank(self, lambda_: float | None) -> Sensitivity:
        """Which units matter most; None tunes lambda on the search split."""
        ...

    def follow(self, ranking: Sensitivity) -> None:
        """Go by this ranking; measures and checks what the search builds on."""
        ...


class Pruning(Protocol):
    """One way to prune a network."""

    @property
    def net(self) -> nn.Module:
        """The network, dense, eval mode."""
        ...

    @property
    def widest(self) -> int:
        """Elements of the largest activation of one sample."""
        ...

    @property
    def limits(self) -> str:
        """What the budget is on: a key of `search.problem.UNITS`."""
        ...

    def measures_precision(self, target: Target) -> bool:
        """Whether it has to be measured which precision is the fastest on a target; else int8 is taken."""
        ...

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The decisions of the search."""
        ...

    @property
    def finalists(self) -> int:
        """How many of the search's best plans are reconstructed sequentially before one is taken, at most."""
        ...

    def prober(self, target: Target, precision: Precision, note: Note) -> Prober:
        """Latency models of candidates; `note` is told where they could not be made in the usual way."""
        ...

    @property
    def prunable_macs_share(self) -> float | None:
        """Share of the network's multiply-accumulates that get cheaper when units are removed; None where none ever do."""
        ...

    @property
    def locked(self) -> tuple[str, ...]:
        """What keeps most of a network from being pruned, a sentence each; empty where at least half of it can be."""
        ...

    def evaluator(self, bench: Bench) -> RankedEvaluator:
        """What the search asks."""
        ...

    def plan(self, levels: Levels, ranking: Sensitivity, before: Stage) -> Plan:
        """The plan of a setting that the stage `before` chose; files that belong to it lie in a stage of their own."""
        ...

    def solved(self, plan: Plan, inputs: Inputs) -> nn.Module:
        """The planned network, after sequential reconstruction on training samples, augmented."""
        ...

    def blank(self, plan: Plan) -> nn.Module:
        """A network of the planned shape, for weights from a file."""
        ...

    def masks(self, plan: Plan) -> dict[str, Tensor]:
        """Parameter -> 0 where fine-tuning has to leave a zero."""
        ...

    def remask(self, plan: Plan, teacher: nn.Module, inputs: Inputs, epochs: int) -> Remask | None:
        """For `--mask dynamic`: re-chooses the masks after each epoch, see `dynamic_masks.dynamic`."""
        ...

    def sparsity(self, dense: nn.Module, student: nn.Module) -> float:
        """Share of the dense network's weights that are gone or zero."""
        ...

    def remarks(self, runtime: str) -> tuple[str, ...]:
        """What the report has to say about this way on this runtime."""
        ...


def prunable(pruning: Pruning) -> Iterator[str]:
    """Says how much of a network can be pruned, and where that is less than half what keeps the rest."""
    if pruning.prunable_macs_share is not None:
        share, decisions = 100 * pruning.prunable_macs_share, len(pruning.knobs)
        yield f"prunable: {share:.1f} % of the multiply-accumulates, by {decisions} decisions"
        yield from pruning.locked
