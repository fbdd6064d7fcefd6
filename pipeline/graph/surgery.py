"""Physical removal: a canonical network and a plan give a smaller network with the same names.

`masked` is the same network with zeros in place. That the two agree is checked before anything is built on a plan
(`check_equivalence`), and is a property test: it is the proof that the coupling of channels was understood.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...targets.base import Structure
from ..errors import BuildError, deepest_cause
from ..options import Pattern
from ..types import Plan
from .coupling import Coupling
from .trace import is_relu

SAME = 1e-3  # largest difference between pruned and masked, as a share of the largest logit, that float may make

Kept = Mapping[str, tuple[int, ...]]  # group name -> kept unit indices, rising


def cuts(coupling: Coupling, kept: Kept) -> dict[tuple[str, int], set[int]]:
    """Positions that go: (parameter, axis) -> indices."""
    gone: dict[tuple[str, int], set[int]] = {}
    for name, stay in kept.items():
        units = coupling.units[name]
        if not stay or not set(stay) <= set(range(len(units))):
            raise BuildError(
                f"plan of group {name}", found=f"{len(stay)} kept units", expected=f"1..{len(units)} of 0..{len(units) - 1}"
            )
        for unit in sorted(set(range(len(units))) - set(stay)):
            for part in units[unit].slices:
                gone.setdefault((part.parameter, part.axis), set()).update(part.indices)
    return gone


def structure_of(net: fx.GraphModule, coupling: Coupling, plan: Plan) -> Structure:
    """Shape of the planned network: the kept inputs and outputs of every layer that is left and that some plan could change."""
    gone = cuts(coupling, plan.kept)
    dropped = {layer for name in plan.removed_blocks for layer in coupling.blocks[name].layers}
    widths = {}
    for name in coupling.layers:
        module = net.get_submodule(name)
        if not isinstance(module, nn.Conv2d | nn.Linear) or name in dropped:
            continue
        ins = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        lost_outs, lost_ins = (len(gone.get((f"{name}.weight", axis), ())) for axis in (0, 1))
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1  # its outputs are its inputs
        widths[name] = (ins - (lost_outs if depthwise else lost_ins), len(module.weight) - lost_outs)
    return Structure(widths, tuple(coupling.blocks[name].tail for name in plan.removed_blocks))


def prune(
    net: fx.GraphModule, coupling: Coupling, plan: Plan, weights: Mapping[str, torch.Tensor] | None = None
) -> fx.GraphModule:
    """The network without the plan's channels and blocks. `net` is left as it is.

    Args:
        net: canonical network.
        coupling: what `couple(net)` found.
        plan: a plan of pattern "channel".
        weights: for some layers, a weight that already has only the kept *inputs* (a reconstructed one), all outputs.

    Raises:
        BuildError: the plan does not fit the network.
    """
    if plan.pattern is not Pattern.CHANNEL:
        raise BuildError("surgery removes channels and blocks", found=f"a plan of pattern {plan.pattern}", expected="channel")
    small = _without_blocks(net, coupling, plan.removed_blocks)
    modules, given = dict(small.named_modules()), weights or {}
    for name, weight in given.items():
        if name in modules:
            _put(modules[name], "weight", weight)
    for (parameter, axis), indices in cuts(coupling, plan.kept).items():
        layer, _, own = parameter.rpartition(".")
        if layer in modules and not (axis == 1 and layer in given):
            tensor = getattr(modules[layer], own)
            _put(modules[layer], own, tensor.index_select(axis, _stay(tensor.shape[axis], indices).to(tensor.device)))
    for module in modules.values():
        _fit_sizes(module)
    return small


def masked(net: fx.GraphModule, coupling: Coupling, plan: Plan) -> fx.GraphModule:
    """The network with zeros where the plan removes: same function as `prune`, same size as before."""
    same = copy.deepcopy(net)
    tensors = {**dict(same.named_parameters()), **dict(same.named_buffers())}
    with torch.no_grad():
        for (parameter, axis), indices in cuts(coupling, plan.kept).items():
            tensor = tensors[parameter]
            tensor.index_fill_(axis, torch.tensor(sorted(indices), device=tensor.device), 0.0)
        nodes = {n.name: n for n in same.graph.nodes}
        for name in plan.removed_blocks:
            block = coupling.blocks[name]
            addition, branch = nodes[block.addition], nodes[block.branch]
            with same.graph.inserting_before(addition):
                zero = same.graph.call_function(torch.zeros_like, (branch,))
            addition.replace_input_with(branch, zero)
    same.recompile()
    return same


def check_equivalence(net: fx.GraphModule, coupling: Coupling, plan: Plan, image_shape: tuple[int, int, int]) -> float:
    """Largest difference between pruned and masked network, relative to the largest logit, on random inputs.

    Raises:
        BuildError: they differ by more than float noise: the graph was misunderstood, and nothing may be built on it.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, *image_shape, generator=generator)
    difference = _difference(net, coupling, plan, inputs)
    if not difference < SAME:
        difference = _difference(copy.deepcopy(net).double(), coupling, plan, inputs)  # deep networks add up float noise
    if not difference < SAME:
        raise BuildError(
            "the pruned network is not the masked network",
            found=f"a relative difference of {difference:.2g}",
            expected=f"less than {SAME}",
            do="the network couples channels in a way that is not understood; use --pattern weight",
        )
    return difference


def _difference(net: fx.GraphModule, coupling: Coupling, plan: Plan, inputs: torch.Tensor) -> float:
    """Largest difference between pruned and masked network, relative to the largest logit."""
    inputs = inputs.to(next(net.parameters()))
    try:
        with torch.no_grad():
            expected = masked(net, coupling, plan).eval()(inputs)
            found = prune(net, coupling, plan).eval()(inputs)
    except Exception as error:  # the user's own functions are called, on shapes that they were not written for
        raise BuildError(
            "the pruned network does not run", found=deepest_cause(error), do="report the network's forward"
        ) from error
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))


def _stay(count: int, gone: Iterable[int]) -> torch.Tensor:
    keep = torch.ones(count, dtype=torch.bool)
    keep[list(gone)] = False
    return keep.nonzero().flatten()


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    own = tensor.detach().to(getattr(module, name).device).clone()
    setattr(module, name, nn.Parameter(own) if name in module._parameters else own)


def _fit_sizes(module: nn.Module) -> None:
    """Set the attributes in which a module keeps the sizes of its parameters."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels == module.out_channels != 1:  # depthwise
            module.groups = len(module.weight)
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, _BatchNorm):
        sizes = [len(t) for t in (*module.parameters(), *module.buffers()) if t.ndim]
        module.num_features = sizes[0] if sizes else module.num_features


def _without_blocks(net: fx.GraphModule, coupling: Coupling, names: tuple[str, ...]) -> fx.GraphModule:
    """A copy with the branches gone; a ReLU after the addition goes too where the shortcut has had one already."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(net.graph, copies))
    nodes = {node.name: copied for node, copied in copies.items()}
    for name in names:
        block = coupling.blocks[name]
        addition = nodes[block.addition]
        # Read from the addition as it is now: an earlier block's removal may have put another node in the shortcut's place.
        shortcut = next(a for a in addition.all_input_nodes if a is not nodes[block.branch])
        users = list(addition.users)
        addition.replace_all_uses_with(shortcut)
        graph.erase_node(addition)
        if len(users) == 1 and is_relu(net, users[0]) and is_relu(net, shortcut):
            users[0].replace_all_uses_with(shortcut)
            graph.erase_node(users[0])
    small = fx.GraphModule(net, graph)
    small.graph.eliminate_dead_code()
    small.delete_all_unused_submodules()
    small.recompile()
    return copy.deepcopy(small)
