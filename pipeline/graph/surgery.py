"""Physical removal: a canonical network and a plan give a smaller network with the same names.

`masked` is the same network with zeros in place. That the two agree is checked before anything is built on a plan
(`check_equivalence`), and is a property test: it is the proof that the coupling of channels was understood.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import fx, nn

from ..errors import BuildError
from ..types import Pattern, Plan
from .coupling import IN, NORM, OUT, Coupling
from .trace import is_relu

Kept = Mapping[str, tuple[int, ...]]  # group name -> kept unit indices, rising


def cuts(coupling: Coupling, kept: Kept) -> dict[tuple[str, int], set[int]]:
    """Channels that go: (layer, role) -> indices."""
    gone: dict[tuple[str, int], set[int]] = {}
    for name, stay in kept.items():
        units = coupling.units[name]
        if not stay or not set(stay) <= set(range(len(units))):
            raise BuildError(
                f"plan of group {name}", found=f"{len(stay)} kept units", expected=f"1..{len(units)} of 0..{len(units) - 1}"
            )
        for unit in sorted(set(range(len(units))) - set(stay)):
            for member in units[unit].members:
                gone.setdefault((member.layer, member.role), set()).add(member.index)
    return gone


def prune(
    net: fx.GraphModule, coupling: Coupling, plan: Plan, weights: Mapping[str, torch.Tensor] | None = None
) -> fx.GraphModule:
    """The network without the plan's channels and blocks. `net` is left as it is.

    Args:
        net: canonical network.
        coupling: what `groups.couple(net)` found.
        plan: a plan of pattern "channel".
        weights: for some layers, a weight that already has only the kept *inputs* (a compensated one), all outputs.

    Raises:
        BuildError: the plan does not fit the network.
    """
    if plan.pattern is not Pattern.CHANNEL:
        raise BuildError("surgery removes channels and blocks", found=f"a plan of pattern {plan.pattern}", expected="channel")
    small = _without_blocks(net, coupling, plan.removed_blocks)
    gone = cuts(coupling, plan.kept)
    for name, module in list(small.named_modules()):
        outs, ins, norm = (gone.get((name, role), set()) for role in (OUT, IN, NORM))
        given = (weights or {}).get(name)
        if isinstance(module, nn.Conv2d | nn.Linear) and (outs or ins or given is not None):
            _replace(small, name, _cut_layer(module, outs, ins, given))
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and norm:
            _replace(small, name, _cut_norm(module, norm))
    return small


def masked(net: fx.GraphModule, coupling: Coupling, plan: Plan) -> fx.GraphModule:
    """The network with zeros where the plan removes: same function as `prune`, same size as before."""
    same = copy.deepcopy(net)
    gone = cuts(coupling, plan.kept)
    with torch.no_grad():
        for (name, role), indices in gone.items():
            module, where = same.get_submodule(name), torch.tensor(sorted(indices))
            if role == IN:
                module.weight[:, where] = 0.0  # type: ignore[operator]
                continue
            module.weight[where] = 0.0  # type: ignore[operator]
            if isinstance(module.bias, torch.Tensor):
                module.bias[where] = 0.0
        for name in plan.removed_blocks:
            block = coupling.blocks[name]
            addition = next(n for n in same.graph.nodes if n.name == block.addition)
            end = next(a for a in addition.all_input_nodes if a.name != block.shortcut)
            with same.graph.inserting_before(addition):
                zero = same.graph.call_function(torch.zeros_like, (end,))
            addition.replace_input_with(end, zero)
    same.recompile()
    return same


def check_equivalence(net: fx.GraphModule, coupling: Coupling, plan: Plan, image_shape: tuple[int, int, int]) -> float:
    """Largest difference between pruned and masked network, relative to the largest logit, on random inputs.

    Raises:
        BuildError: they differ by more than float noise: the graph was misunderstood, and nothing may be built on it.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(net.parameters()).device
    inputs = torch.randn(4, *image_shape, generator=generator).to(device)
    with torch.no_grad():
        expected = masked(net, coupling, plan).eval()(inputs)
        try:
            found = prune(net, coupling, plan).eval()(inputs)
        except RuntimeError as error:
            raise BuildError(
                "the pruned network does not run", found=str(error).splitlines()[0], do="report the network's forward"
            ) from error
    difference = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference < 1e-3:
        raise BuildError(
            "the pruned network is not the masked network",
            found=f"a relative difference of {difference:.2g}",
            expected="less than 0.001",
            do="the network couples channels in a way that is not understood; use --pattern weight",
        )
    return difference


def _replace(net: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)


def _stay(count: int, gone: Iterable[int]) -> torch.Tensor:
    keep = torch.ones(count, dtype=torch.bool)
    keep[list(gone)] = False
    return keep.nonzero().flatten()


def _cut_layer(layer: nn.Conv2d | nn.Linear, outs: set[int], ins: set[int], given: torch.Tensor | None) -> nn.Conv2d | nn.Linear:
    full = layer.weight.detach()
    rows = _stay(full.shape[0], outs)
    weight = given if given is not None else full[:, _stay(full.shape[1], ins)] if ins else full
    weight = weight[rows].to(full.device).clone()
    bias = layer.bias is not None
    new: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Linear):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias, device="meta")
    else:
        groups = weight.shape[0] if layer.groups > 1 else 1
        new = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            cast(tuple[int, int], layer.kernel_size),
            cast(tuple[int, int], layer.stride),
            cast(tuple[int, int] | str, layer.padding),
            cast(tuple[int, int], layer.dilation),
            groups,
            bias,
            layer.padding_mode,
            device="meta",
        )
    new.weight = nn.Parameter(weight)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach()[rows].clone())
    return new.train(layer.training)


def _cut_norm(norm: nn.BatchNorm2d | nn.BatchNorm1d, gone: set[int]) -> nn.Module:
    stay = _stay(norm.num_features, gone)
    new = type(norm)(len(stay), norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    with torch.no_grad():
        for name, tensor in list(norm.named_parameters()) + list(norm.named_buffers()):
            cut = tensor.detach()[stay].clone() if tensor.ndim else tensor.detach().clone()
            if name in new._parameters:
                new._parameters[name] = nn.Parameter(cut)
            else:
                new._buffers[name] = cut
    return new.train(norm.training)


def _without_blocks(net: fx.GraphModule, coupling: Coupling, names: tuple[str, ...]) -> fx.GraphModule:
    """A copy with the branches gone; a ReLU after the addition goes too where the shortcut has had one already."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(net.graph, copies))
    for name in names:
        block = coupling.blocks[name]
        addition = next(copies[n] for n in net.graph.nodes if n.name == block.addition)
        tail = copies[next(n for n in net.graph.nodes if n.op == "call_module" and n.target == block.tail)]
        # Read from the addition as it is now: an earlier block's removal may have put another node in the shortcut's place.
        shortcut = next(a for a in addition.all_input_nodes if not reaches(a, tail))
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


def reaches(node: fx.Node, target: fx.Node) -> bool:
    """Whether `target` is `node` or lies before it within its own branch."""
    queue, seen = [node], set()
    while queue:
        current = queue.pop()
        if current is target:
            return True
        if current not in seen and len(current.users) <= 1:
            seen.add(current)
            queue.extend(current.all_input_nodes)
    return False
