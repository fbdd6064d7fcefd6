"""What a candidate is worth: one-shot accuracy on images of the search split, and latency measured on the device.

A candidate is cheap because nothing is solved or exported for it: its weights are stitched from per-layer solutions (each layer
re-solved once for each set of kept inputs, the layer-wise database of SPDY, Frantar & Alistarh 2022, arXiv 2201.13096), its
BatchNorm statistics are taken again on a few augmented images, and both the network that answers and the one that is timed are
the dense ONNX graph cut to shape. It answers in ONNX Runtime in the artifact's precision, see `candidate`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from statistics import median

import torch
from torch import fx, nn

from ...targets.base import Structure
from ..errors import BuildError, DeviceError
from ..graph.coupling import Coupling
from ..graph.knobs import plan_for
from ..graph.surgery import cuts, prune, structure_of
from ..network.batchnorm import Moments
from ..reconstruct.least_squares import stitched_weight
from ..types import Candidate, Kind, Knob, ModelCost, Plan
from .candidate_graph import CandidateGraph
from .evaluation_context import Bench
from .evaluation_log import Memo
from .file_size import FileSize

Change = tuple[str, int, tuple[str, ...]]  # see `StitchedEvaluator._change`


def table_error(estimate: Callable[[tuple[int, ...]], float], tried: tuple[Candidate, ...]) -> float | None:
    """Median relative error of latencies read from the table against the measured ones.

    Over candidates that more than one knob makes: the others are in the table. None when there are none.
    """
    mixed = [c for c in tried if sum(map(bool, c.levels)) > 1 and c.latency_kind is Kind.MEASURED]
    errors = [abs(estimate(c.levels) / c.latency_ratio - 1.0) for c in mixed]
    return float(median(errors)) if errors else None


class StitchedEvaluator:
    """`env.Evaluator` over a real network and a real device.

    Answers are kept in `memo`, one JSON line each, so that a search which is run again replays up to where it was; latencies are
    kept in the device's cache, so that every run on this device sees the same number for the same structure.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        coupling: Coupling,
        knobs: tuple[Knob, ...],
        order: Mapping[str, tuple[int, ...]],
        bench: Bench,
    ) -> None:
        self.net, self.coupling, self._knobs, self.order, self.bench = net, coupling, knobs, order, bench
        self.solved: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._table: dict[tuple[int, int], float] = {}
        self._sizes: dict[tuple[int, ...], float] = {}
        images = bench.images
        self._graph = CandidateGraph(net, tuple(images.inputs.shape[1:]), images.calibration(bench.precision))
        self._memo = Memo(bench.memo)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The decisions, in the order of every `levels` tuple."""
        return self._knobs

    def evaluate(self, levels: tuple[int, ...]) -> Candidate:
        """Accuracy and loss on the reward images, latency ratio measured on the device."""
        known = self._memo.get(levels)
        if known is not None:
            return known
        start = time.perf_counter()
        plan = plan_for(self.knobs, levels, self.order, "")
        structure = structure_of(self.net, self.coupling, plan)
        net = self.network(plan)
        accuracy, loss = self._score(net, structure)
        ratio = self.bench.latency_ratio(structure)
        cost = ModelCost(sum(p.numel() for p in net.parameters()), self.bench.prober.macs(structure))
        size = self.bench.size_bytes(structure) if self.bench.sized else None
        seconds = time.perf_counter() - start
        return self._memo.add(Candidate(levels, accuracy, loss, ratio, self.bench.kind, cost, seconds, size_bytes=size))

    @cached_property
    def _dense_moments(self) -> Moments:
        return self.bench.images.dense_moments(self.net)

    @property
    def width(self) -> int:
        """How many candidates' latencies are measured at once."""
        return self.bench.meter.width

    def expect(self, settings: Sequence[tuple[int, ...]]) -> None:
        """Measure the latencies of settings that are likely to be asked for, each on one of several boards.

        What fails is left: if it is asked for indeed, it fails then.
        """
        new = [levels for levels in settings if self._memo.get(levels) is None]
        plans = [plan_for(self.knobs, levels, self.order, "") for levels in new]
        with suppress(BuildError, DeviceError):
            self.bench.expect([structure_of(self.net, self.coupling, plan) for plan in plans])

    def one_shot(self, plan: Plan) -> tuple[float, float]:
        """Accuracy (share) and loss of a plan on the reward images; its latency is not asked for."""
        return self._score(self.network(plan), structure_of(self.net, self.coupling, plan))

    def _score(self, net: fx.GraphModule, structure: Structure) -> tuple[float, float]:
        images = self.bench.images
        return images.judge(self._graph.answers(net, structure, images.inputs.numpy()))

    def network(self, plan: Plan) -> fx.GraphModule:
        """The planned network with stitched weights and BatchNorm statistics of its own, eval mode."""
        gone = cuts(self.coupling, plan.kept)
        weights = {}
        for name, module in self.net.named_modules():
            missing = gone.get((f"{name}.weight", 1))
            if missing and isinstance(module, nn.Conv2d | nn.Linear) and name in self.bench.hessians:
                weights[name] = self._stitched(name, module, missing)
        small = prune(self.net, self.coupling, plan, weights).eval()
        kept = {
            name: torch.tensor([i for i in range(len(mean)) if i not in gone.get((f"{name}.running_mean", 0), ())])
            for name, (mean, _) in self._dense_moments.items()
        }
        self.bench.images.restore(small, self._dense_moments, kept)
        return small

    def _stitched(self, name: str, module: nn.Conv2d | nn.Linear, missing: set[int]) -> torch.Tensor:
        kept = tuple(i for i in range(module.weight.shape[1]) if i not in missing)
        if (name, kept) not in self.solved:
            self.solved[name, kept] = stitched_weight(module, self.bench.hessians[name], torch.tensor(kept))
        return self.solved[name, kept]

    def latency_estimate(self, levels: tuple[int, ...]) -> float:
        """Ratio from the table: the dense structure's less the sum of what each knob alone was measured to save.

        Knobs inside a removed block save nothing. Savings of different layers add up, as in the knapsack; those of one layer that
        two knobs make narrower overlap, so the sum is kept above a twentieth of the dense ratio.
        """
        gone = {k.name for k, level in zip(self.knobs, levels, strict=True) if k.kind == "block" and level}
        dense = self._entry(-1, 0)
        saved = 0.0
        for i, (knob, level) in enumerate(zip(self.knobs, levels, strict=True)):
            if level and knob.block not in gone:
                saved += dense - self._entry(i, level)
        return max(dense - saved, 0.05 * dense)

    def size_estimate(self, levels: tuple[int, ...]) -> float:
        """Bytes of the setting's file without labels and metadata, see `file_size`."""
        if levels not in self._sizes:
            plan = plan_for(self.knobs, levels, self.order, "")
            self._sizes[levels] = self._file_size(structure_of(self.net, self.coupling, plan))
        return self._sizes[levels]

    @cached_property
    def _file_size(self) -> FileSize:
        deepest = tuple(0 if k.kind == "block" else len(k.kept) - 1 for k in self.knobs)
        blocks = tuple(int(k.kind == "block") for k in self.knobs)
        plans = [plan_for(self.knobs, levels, self.order, "") for levels in (deepest, blocks)]
        structures = [structure_of(self.net, self.coupling, plan) for plan in plans]
        alone = [self._alone(i, len(k.kept) - 1) for i, k in enumerate(self.knobs)]
        return FileSize(self.net, self.bench.size_bytes, [self._alone(-1, 0), *alone, *structures])

    def fill_table(self) -> int:
        """Measure every entry of the table; returns how many there are.

        What one knob of many saves can be less than the noise of a measurement, and a search would pick the knobs that were
        lucky. Entries that change layers of the same shapes in the same way must save the same: they get their median.
        """
        entries = [(i, level) for i, knob in enumerate(self.knobs) for level in range(1, len(knob.kept))]
        self.bench.measure_ahead([self._alone(*entry) for entry in [(-1, 0), *entries]])
        self._entry(-1, 0)
        alike: dict[Change, list[tuple[int, int]]] = {}
        for i, level in entries:
            self._entry(i, level)
            alike.setdefault(self._change(i, level), []).append((i, level))
        for same in alike.values():
            middle = statistics.median(self._table[entry] for entry in same)
            self._table.update(dict.fromkeys(same, middle))
        return len(self._table)

    def _entry(self, knob: int, level: int) -> float:
        if (knob, level) not in self._table:
            self._table[knob, level] = self.bench.latency_ratio(self._alone(knob, level))
        return self._table[knob, level]

    def _alone(self, knob: int, level: int) -> Structure:
        levels = tuple(level if i == knob else 0 for i in range(len(self.knobs)))
        return structure_of(self.net, self.coupling, plan_for(self.knobs, levels, self.order, ""))

    def _change(self, knob: int, level: int) -> Change:
        """What a knob alone changes, without names: its kind, the MACs that are left, the layers' shapes before and after."""
        before, after = self._alone(-1, 0).widths, self._alone(knob, level)
        layers = []
        for name, width in before.items():
            if after.widths.get(name) != width:
                module = self.net.get_submodule(name)
                kernel = (module.kernel_size, module.stride, module.groups) if isinstance(module, nn.Conv2d) else ()
                layers.append(f"{kernel} {width} {after.widths.get(name)}")
        return self.knobs[knob].kind, self.bench.prober.macs(after), tuple(sorted(layers))
