"""Files of candidates of a captured network: cut from one exported graph or file where that can be done, else exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import cached_property

import onnx
from torch import nn

from ...targets.base import Estimator, Prober, Structure, Target
from ...targets.onnx.graph import Graph
from ...targets.onnx.prober import OnnxProber
from ...targets.onnx.target import OnnxTarget
from ...targets.tensorrt.prober import JetsonProber
from ..axes.coupling import Coupling
from ..axes.coupling import Plan as Gone
from ..axes.cutting.gate import Checked, enlivened
from ..axes.cutting.surgery import cut
from ..errors import BuildError, UnavailableError
from ..options import Precision
from ..signature import Signature
from ..types import Plan
from .exported.unit_graph import UnitGraph


class UnitProber:
    """`targets.base.Prober` for structures that count the units left of each group: group -> (units left, units).

    Which units stay does not change what a network costs: the first ones do. Where the target's files are ONNX, candidates are
    cut from one exported graph, else from one file, layer by layer; where that cannot be done, the cut module is exported.

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
        self._note, self._said = note, set[str]()
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
        narrowed = self._narrowed(structure)
        return self._exported(structure).candidate(Structure({})) if narrowed is None else narrowed

    def _narrowed(self, structure: Structure) -> bytes | None:
        """The file of the whole network cut layer by layer, for targets that can; None where that cannot be done."""
        if isinstance(self._target, OnnxTarget) or self._whole is None:
            return None
        try:
            return self._whole.candidate(by_layer(self._checked.coupling, structure))
        except BuildError as error:
            self._say("Some candidates were exported", error)
            return None

    @cached_property
    def _whole(self) -> Prober | None:
        try:
            return self._exported(Structure({}))
        except BuildError as error:
            self._say("Every candidate was exported", error)
            return None

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
            return whole, graph.cut(whole.dense, first_units(structure))
        except BuildError as error:  # a branch whose end was not found
            self._say("Some candidates were exported", error)
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
                self._say("Every candidate was exported", error)
                return None

    def _exported(self, structure: Structure) -> Prober:
        coupling = self._checked.coupling
        plan = first_units(structure)
        # the whole network as it is: its export is kept for what evaluates candidates in int8
        module = cut(coupling, plan, self._checked.sized) if plan else coupling.walk.captured.module
        return self._target.prober(module, self._signature, self._precision)

    def _say(self, what: str, why: BuildError) -> None:
        """Notes, for the first of such candidates, how they were made."""
        if what not in self._said:
            self._said.add(what)
            self._note(f"{what}, which takes seconds each: {why}")


def removed(plan: Plan, sizes: Mapping[str, int]) -> Gone:
    """Returns the units that a plan removes, group -> units; of a removed block its one unit."""
    units = {name: sorted(set(range(sizes[name])) - set(kept)) for name, kept in plan.kept.items()}
    return units | {name: [0] for name in plan.removed_blocks}


def macs_left(coupling: Coupling, plan: Gone) -> dict[int, int]:
    """Multiply-accumulates of each cost of the walk, by its number, without a plan's units."""
    gone = coupling.gone(plan)
    costs = coupling.walk.costs
    absent = {costs[k].node for block in coupling.left_out(plan) for k in block.operators}  # fused attention has two costs
    found = {}
    for number, cost in enumerate(costs):
        shares = (float(coupling.kept(axis, gone).mean()) for axis in cost.axes)
        found[number] = 0 if cost.node in absent else round(cost.macs * math.prod(shares))
    return found


def by_layer(coupling: Coupling, structure: Structure) -> Structure:
    """The inputs and outputs left of every layer that loses some, and the last layers of the branches left out."""
    plan = first_units(structure)
    gone = coupling.gone(plan)
    absent = {name for block in coupling.left_out(plan) for name in block.modules}
    widths = {}
    for name, layer in coupling.walk.captured.module.named_modules():
        axes = coupling.walk.parameters.get(f"{name}.weight", ())
        if not isinstance(layer, nn.Conv2d | nn.Linear) or len(axes) < 2 or _inside(name, absent):
            continue
        outputs, inputs = (int(coupling.kept(axis, gone).sum()) for axis in axes[:2])
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            if layer.groups != layer.in_channels and outputs != layer.out_channels:
                raise BuildError(f"{name} cannot be cut by its numbers of channels", found="a grouped convolution")
            inputs = layer.in_channels * outputs // layer.out_channels
        if (outputs, inputs) != (len(layer.weight), layer.weight.shape[1] * getattr(layer, "groups", 1)):
            widths[name] = (inputs, outputs)
    return Structure(widths, tuple(name.removeprefix("block:") for name in structure.removed))


def _inside(name: str, modules: Collection[str]) -> bool:
    """Whether a module is one of some, or lies in one."""
    return any(name == other or name.startswith(f"{other}.") for other in modules)


def first_units(structure: Structure) -> Gone:
    """Returns the units to remove for a structure, group -> units: the last ones; of a removed block its one unit."""
    units = {group: range(left, size) for group, (left, size) in structure.widths.items() if left < size}
    return units | dict.fromkeys(structure.removed, range(1))
