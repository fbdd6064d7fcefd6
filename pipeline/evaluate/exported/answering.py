"""Evaluates candidates in int8 in ONNX Runtime, where the artifact will be int8.

The network is exported and quantized once; for every candidate the graph is cut and given the candidate's weights. Activation
ranges are the dense network's. They fit its candidates, whose BatchNorm statistics are their own, well enough to compare them;
the artifact's are calibrated on the pruned network itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import torch
from torch import nn

from ....calibration.ranges import collect, ranges
from ....targets.base import Arrays
from ....targets.onnx.export import export_float
from ....targets.onnx.graph import Graph
from ....targets.onnx.int8 import STEPS, Recipe, has_vnni, quantize
from ....targets.onnx.run import predictor
from ...axes.capture import Captured, operator_name
from ...axes.coupling import Plan, couple
from ...axes.cutting.gate import Checked, enlivened
from ...axes.cutting.surgery import cut
from ...axes.program import Program, part_of
from ...errors import BuildError, deepest_cause
from ...network.calling import Inputs, Outputs, arrays_of, tensors_of
from ...options import Precision
from ...signature import Signature
from ..reward_samples import RewardSamples
from .unit_graph import UnitGraph, require_same

COST = 0.02  # share of accuracy that the dense network may lose in int8 for its candidates to be evaluated in int8
RECIPES = tuple(  # large maps have outliers; without VNNI sums of 8-bit weights can saturate
    Recipe(method, bits)
    for method in ("min-max", "percentile-99.999", "percentile-99.99")
    for bits in ((8,) if has_vnni() else (8, 7))
)


class Int8Answers:
    """The exported graph, quantized by the recipe with the least error of the dense network's outputs.

    Args:
        checked: groups that passed the gate.
        signature: of the network.
        calibration: network inputs that the dense network's activation ranges are taken on.

    Raises:
        BuildError: the exporter refused the network, or its graph cannot be cut or given other weights: it does not answer then
            as the network does.
    """

    def __init__(self, checked: Checked, signature: Signature, calibration: Inputs) -> None:
        module = checked.coupling.walk.captured.module
        with enlivened(module):
            network = Graph(export_float(module, signature))
            self._graph = UnitGraph(checked, network)
            self._graph.require_branches()
            self._compare(checked, network)
        float_model = self._graph.filled(network, {}, module)
        require_same(float_model, module, checked, "the exported graph does not answer as the dense network does")
        given = arrays_of(calibration)
        seen = collect(float_model, [given], threads=torch.get_num_threads())
        exact = _outputs(float_model, given)
        tried = [quantize(float_model, ranges(seen, recipe.ranges), recipe) for recipe in RECIPES]
        errors = [_error(_outputs(model, given), exact) for model in tried]
        best = int(np.argmin(errors))
        self._quantized, self.recipe = Graph(tried[best]), RECIPES[best]
        blocks: Plan = {block.name: range(1) for block in checked.coupling.blocks}
        self.answers(cut(checked.coupling, blocks, checked.sized), blocks, part_of(calibration, 0, 1))

    def answers(self, module: nn.Module, plan: Plan, inputs: Inputs) -> Outputs:
        """A candidate's outputs.

        Args:
            module: the network that was cut, with its weights and BatchNorm statistics.
            plan: what was cut: group -> units that go, block -> 0 if it goes.
            inputs: network inputs, the samples along axis 0.

        Raises:
            BuildError: the candidate has no place in the graph, or the runtime refused the graph.
        """
        model = self._graph.filled(self._quantized, plan, module, STEPS[self.recipe.weight_bits])
        return _outputs(model, arrays_of(inputs))

    def _compare(self, checked: Checked, network: Graph) -> None:
        """Checks the graph with other weights, whole and without half of every group, against the module with these weights.

        Raises:
            BuildError: their outputs differ.
        """
        coupling = checked.coupling
        plan: Plan = {g.name: range(len(g.units) // 2, len(g.units)) for g in coupling.paying_groups()}
        for units in ({}, plan):
            small = cut(coupling, units, checked.sized)
            _redraw(small, checked)
            what = "the exported graph does not answer as a network with other weights does"
            require_same(self._graph.filled(network, units, small), small, checked, what)


def int8_answers(
    checked: Checked, signature: Signature, reward: RewardSamples, precision: Precision, note: Callable[[str], None]
) -> Int8Answers | None:
    """The int8 graph that evaluates candidates; None where they are evaluated in float.

    That is where the artifact is float, where the graph cannot be given their weights, or where quantizing all layers costs the
    dense network more than `COST`: sensitive layers of an artifact can stay in float, those of a candidate cannot.

    Args:
        checked: groups that passed the gate.
        signature: of the network.
        reward: samples that candidates are judged on.
        precision: of the artifact.
        note: told why candidates of an int8 artifact answer in float.
    """
    calibration = reward.calibration(precision)
    if calibration is None:
        return None
    dense = checked.coupling.walk.captured.module
    try:
        graph = Int8Answers(checked, signature, calibration)
        in_int8, _ = reward.judge(graph.answers(dense, {}, reward.batch.inputs))
    except Exception as error:  # of the converter and the runtime, whose exceptions share no base but this one
        note(f"Candidates answered in float: {error if isinstance(error, BuildError) else deepest_cause(error)}")
        return None
    in_float, _ = reward.judge(reward.answers(dense))
    if in_float - in_int8 > COST:
        lost = f"with all layers in int8 the dense network loses {in_float - in_int8:.1%} on the search split"
        note(f"Candidates answered in float: {lost}.")
        return None
    return graph


def uncut(captured: Captured) -> Checked:
    """The network with every group locked, for candidates of the dense shape (masks)."""
    coupling = couple(captured)
    reasons = dict.fromkeys((group.name for group in coupling.groups), "connections go, not units")
    return Checked(replace(coupling, blocks=()).lock(reasons), {}, None, True)


def _outputs(model: onnx.ModelProto, inputs: Arrays) -> Outputs:
    """A graph's outputs, computed at batch size 1, as the artifact's are."""
    return tensors_of(predictor(model.SerializeToString(), torch.get_num_threads())(inputs))


def _error(found: Outputs, exact: Outputs) -> float:
    """Mean squared difference of the outputs, each in units of its variance."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    each = [float((a - b).square().mean() / b.var().clamp_min(1e-30)) for a, b in pairs]
    return sum(each) / len(each)


def _redraw(module: nn.Module, checked: Checked) -> None:
    """Change what reconstruction changes: weights and biases of layers, and statistics and affine values of BatchNorm."""
    program = Program(module, checked.coupling.walk.captured)
    there = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    names = {name for layer in program.layers() for name in (layer.weight, layer.bias) if name}
    norms = (node for node in program.nodes if operator_name(node) == "batch_norm")
    names |= {name for norm in norms for a in norm.args[1:5] if (name := program.stored(a))}
    generator = torch.Generator().manual_seed(1)
    for name in sorted(names & there):
        value = program.tensor(name)
        program.put(name, value * (0.75 + 0.5 * torch.rand(value.shape, generator=generator).to(value)))
