"""What a candidate is worth: one-shot accuracy on images of the search split, and latency measured on the device.

A candidate is cheap because nothing is solved or exported for it: its weights are stitched from per-layer solutions (each layer
re-solved once for each set of kept inputs, the layer-wise database of SPDY, Frantar & Alistarh 2022, arXiv 2201.13096), its
BatchNorm statistics are taken again on a few augmented images, and both the network that answers and the one that is timed are
the dense ONNX graph cut to shape. It answers in ONNX Runtime in the artifact's precision, see `candidate`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property

import numpy as np
import torch
from torch import fx, nn

from ...targets.base import Structure
from ..graph.coupling import Coupling
from ..graph.knobs import plan_for
from ..graph.surgery import cuts, prune, structure_of
from ..network.batchnorm import Moments
from ..network.calling import tensors_of
from ..reconstruct.least_squares import stitched_weight
from ..types import Knob, Plan
from .candidate_graph import CandidateGraph
from .evaluation_context import Bench
from .table_evaluator import FloatArray, TableEvaluator


class StitchedEvaluator(TableEvaluator[fx.GraphModule]):
    """Candidates of a traced network."""

    def __init__(
        self,
        net: fx.GraphModule,
        coupling: Coupling,
        knobs: tuple[Knob, ...],
        order: Mapping[str, tuple[int, ...]],
        graph: CandidateGraph,
        bench: Bench,
    ) -> None:
        super().__init__(knobs, bench)
        self.net, self.coupling, self.order = net, coupling, order
        self.solved: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        calibration = bench.reward.calibration(bench.precision)
        self._graph = graph if calibration is None else graph.in_int8(calibration)

    def plan(self, levels: tuple[int, ...]) -> Plan:
        """See `TableEvaluator.plan`."""
        return plan_for(self.knobs, levels, self.order, "")

    def structure(self, plan: Plan) -> Structure:
        """See `TableEvaluator.structure`."""
        return structure_of(self.net, self.coupling, plan)

    @cached_property
    def _dense_moments(self) -> Moments:
        return self.bench.reward.dense_moments(self.net)

    def score(self, net: fx.GraphModule, structure: Structure) -> tuple[float, float]:
        """See `TableEvaluator.score`: answered in the artifact's precision by the dense graph cut to shape."""
        reward = self.bench.reward
        return reward.judge(tensors_of(self._graph.answers(net, structure, reward.batch.inputs.numpy())))

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
        self.bench.reward.restore(small, self._dense_moments, kept)
        return small

    def _stitched(self, name: str, module: nn.Conv2d | nn.Linear, missing: set[int]) -> torch.Tensor:
        kept = tuple(i for i in range(module.weight.shape[1]) if i not in missing)
        if (name, kept) not in self.solved:
            self.solved[name, kept] = stitched_weight(module, self.bench.hessians[name], torch.tensor(kept))
        return self.solved[name, kept]

    def stored(self, structure: Structure) -> FloatArray:
        """See `TableEvaluator.stored`."""
        return stored(self.net, structure)

    def work(self, structure: Structure) -> FloatArray:
        """Of each layer its multiply-accumulates, its outputs and whether it is there."""
        shares = []
        for name, (ins, outs) in self._dense_widths.items():
            left_ins, left_outs = structure.widths.get(name, (0, 0))
            shares += [left_ins * left_outs / (ins * outs), left_outs / outs, float(left_outs > 0)]
        return np.array(shares)

    @cached_property
    def _dense_widths(self) -> Mapping[str, tuple[int, int]]:
        return self.alone(-1, 0).widths

    def change(self, knob: int, level: int) -> Hashable:
        """Its kind, the MACs that are left, the layers' shapes before and after."""
        before, after = self._dense_widths, self.alone(knob, level)
        layers = []
        for name, width in before.items():
            if after.widths.get(name) != width:
                module = self.net.get_submodule(name)
                kernel = (module.kernel_size, module.stride, module.groups) if isinstance(module, nn.Conv2d) else ()
                layers.append(f"{kernel} {width} {after.widths.get(name)}")
        return self.knobs[knob].kind, self.bench.prober.macs(after), tuple(sorted(layers))


def stored(net: nn.Module, structure: Structure) -> FloatArray:
    """Weights, output channels and layers of a structure, of those layers that plans change, (3,)."""
    weights = channels = 0.0
    for name, (inputs, outputs) in structure.widths.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)  # structure_of
        each = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        depthwise = groups > 1 and groups == layer.weight.shape[0]
        weights += each * outputs * (1 if depthwise else inputs / groups)
        channels += outputs
    return np.array([weights, channels, float(len(structure.widths))])
