"""The exported graph of a captured network, to be cut to plans.

Nothing is taken on trust: half of every group, and every residual branch, is cut before the graph is used, and the graph has to
answer as the cut module does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from ....targets.onnx.edit import OnnxEditor
from ....targets.onnx.fill import fill
from ....targets.onnx.graph import DEQUANTIZE, QUANTIZE, Array, Graph, attribute
from ...axes.algebra import Axis
from ...axes.capture import run
from ...axes.coupling import Plan
from ...axes.cutting.comparison import relative_difference
from ...axes.cutting.gate import Checked
from ...axes.cutting.surgery import cut
from ...axes.program import Program
from ...errors import BuildError, deepest_cause
from .literals import Kept, follow
from .ties import answers, feeds_of, tie

SAME = 1e-3  # largest difference from the cut module's outputs, as a share of their range


class UnitGraph:
    """The graph of a captured network.

    Args:
        checked: groups that passed the gate; the module has the weights of `gate.enlivened` now.
        network: the float graph of the whole network, batch 1, exported with these weights.

    Raises:
        BuildError: a cut of the graph does not answer as the cut module does, or cannot be made.
    """

    def __init__(self, checked: Checked, network: Graph) -> None:
        self._coupling, self._network = checked.coupling, network
        self._nodes = {node.name: node for node in network.nodes}
        if len(self._nodes) < len(network.nodes):
            raise BuildError("the exported graph cannot be cut", found="operators of one name")
        try:
            self._ties = tie(checked.coupling, network)
            self._compare(checked)
        except BuildError:
            raise
        except Exception as error:  # the runtime's exceptions share no base but this one
            raise BuildError("the exported graph cannot be cut", found=deepest_cause(error)) from error

    def require_branches(self) -> None:
        """Checks that every residual branch can be left out.

        Raises:
            BuildError: the end of one was not found in the graph.
        """
        missing = [block.name for block in self._coupling.blocks if block.name not in self._ties.branches]
        if missing:
            raise BuildError(f"{missing[0]} cannot be left out of the exported graph", found="no sum of its value")

    def cut(self, dense: Graph, plan: Plan) -> onnx.ModelProto:
        """The graph without a plan's units and branches.

        Args:
            dense: the network's graph, or a QDQ graph that was made of it.
            plan: group -> units that go, block -> 0 if it goes.

        Raises:
            BuildError: an operator cannot follow, or the end of a branch was not found.
        """
        return self._edited(dense, plan).build()

    def filled(self, dense: Graph, plan: Plan, module: nn.Module, weight_steps: int = 127) -> onnx.ModelProto:
        """The graph without a plan's units and branches, with the weights of the network that was cut by the plan.

        Args:
            dense: the network's graph, or a QDQ graph that was made of it.
            plan: group -> units that go, block -> 0 if it goes.
            module: the network that was cut, with its own weights and BatchNorm statistics.
            weight_steps: of a QDQ graph, see `targets.onnx.fill`.

        Raises:
            BuildError: as `cut`, or a weight has no place in the graph.
        """
        editor, program = self._edited(dense, plan), Program(module, self._coupling.walk.captured)
        sources = self._ties.sources
        places = {name.removesuffix("_quantized") for name in editor.used_constants()}
        try:
            factors = self._factors(plan)
            fill(editor, {n: source.made(program, factors) for n, source in sources.items() if n in places}, weight_steps)
        except (AttributeError, KeyError, ValueError) as error:  # a layer that is not there, or a value that is not known
            raise BuildError("the exported graph cannot be given a candidate's weights", found=deepest_cause(error)) from error
        return editor.build()

    def _factors(self, plan: Plan) -> dict[str, Array]:
        """What the rows of query or key projections are multiplied by: the graph holds the attention scale of the whole network.

        The network that was cut has that of its own head dimension, and projections that make up for it (`Rescale`).
        """
        coupling, found = self._coupling, dict[str, Array]()
        gone = coupling.gone(plan)
        for item in coupling.walk.rescales:
            if item.rows and not (mask := coupling.kept(item.axis, gone)).all():
                for name in item.parameters:
                    kept = coupling.kept(coupling.walk.parameters[name][0], gone)
                    factors = np.ones(len(kept), np.float32)
                    factors[list(item.rows)] = float(mask.mean()) ** -item.power
                    found[name] = factors[kept]
        return found

    def _edited(self, dense: Graph, plan: Plan) -> OnnxEditor:
        gone = self._coupling.gone(plan)
        masks: dict[Axis, NDArray[np.bool_]] = {}

        def kept(axis: Axis) -> NDArray[np.bool_]:
            if axis not in masks:
                masks[axis] = self._coupling.kept(axis, gone)
            return masks[axis]

        editor = OnnxEditor(dense)
        by_name = {op.name: op for op in editor.ops}
        for block in self._coupling.left_out(plan):
            branch = self._ties.branches.get(block.name)
            if branch is None:
                raise BuildError(f"{block.name} cannot be left out of the exported graph", found="no sum of its value")
            add = by_name[branch.add]
            if add.output[0] in editor.outputs:  # which has to keep its name
                shortcut = add.input[1 - branch.operand]
                add.CopyFrom(onnx.helper.make_node("Identity", [shortcut], [add.output[0]], add.name))
            else:
                editor.bypass(add.input[branch.operand], add)
        editor.drop_dead()
        self._cut_constants(editor, kept)
        for op in editor.ops:
            if op.name in self._nodes:
                follow(editor, op, self._nodes[op.name], self._ties, kept)
        return editor

    def _cut_constants(self, editor: OnnxEditor, kept: Kept) -> None:
        """Parameters, and the scales and zero points that run along them."""
        for name in editor.used_constants():
            _cut_constant(editor, name, self._ties.constants.get(name.removesuffix("_quantized"), ()), kept)
        for op in editor.ops:
            axes = self._ties.constants.get(op.input[0].removesuffix("_quantized")) if op.input else None
            if op.op_type in (QUANTIZE, DEQUANTIZE) and axes is not None:
                for name in op.input[1:]:
                    if len(editor.constants[name].dims) == 1 and editor.constants[name].dims[0] > 1:
                        _cut_constant(editor, name, [axes[attribute(op, "axis", 1) % len(axes)]], kept)

    def _compare(self, checked: Checked) -> None:
        """Cut the graph, and refuse it where it does not answer as the cut module does."""
        halves = {g.name: range(len(g.units) // 2, len(g.units)) for g in self._coupling.paying_groups()}
        blocks = {block.name: range(1) for block in self._coupling.blocks if block.name in self._ties.branches}
        plans: Sequence[Plan] = [{}, halves, *([blocks] if blocks else [])]
        for plan in plans:
            small = cut(self._coupling, plan, checked.sized)
            what = "a cut of the exported graph does not answer as the cut network does"
            require_same(self.cut(self._network, plan), small, checked, what)


def require_same(model: onnx.ModelProto, module: nn.Module, checked: Checked, what: str) -> None:
    """Checks that a graph answers the captured network's example as a module does.

    Raises:
        BuildError: the outputs differ; `what` is its first part.
    """
    captured = checked.coupling.walk.captured
    expected = run(module, captured.example)
    found = [torch.from_numpy(a) for a in answers(model, feeds_of(captured, Graph(model))).values() if a.dtype.kind == "f"]
    same = [t.shape for t in found] == [t.shape for t in expected]
    difference = relative_difference(found, expected) if same else float("inf")
    if not difference <= SAME:
        raise BuildError(what, found=f"a difference of {difference:.1%} of the outputs' range", expected=f"at most {SAME:.1%}")


def _cut_constant(editor: OnnxEditor, name: str, axes: Sequence[Axis], kept: Kept) -> None:
    """Keep the positions of a constant that stay; the dense constant is cut, so that twice is as good as once."""
    masks = [(at, mask) for at, axis in enumerate(axes) if not (mask := kept(axis)).all()]
    if masks:
        value: Array = numpy_helper.to_array(editor.constants[name])
        for at, mask in masks:
            value = np.compress(mask, value, axis=at)
        editor.put(name, value)
