"""The shape of a pruned network, as targets cut it out of their own file."""

from __future__ import annotations

from torch import fx, nn

from ...targets.base import Structure
from ..types import Plan
from .coupling import IN, OUT, Coupling
from .surgery import cuts


def structure_of(net: fx.GraphModule, coupling: Coupling, plan: Plan) -> Structure:
    """Shape of the planned network: the kept inputs and outputs of every layer that is left and that some plan could change."""
    gone = cuts(coupling, plan.kept)
    dropped = {layer for name in plan.removed_blocks for layer in coupling.blocks[name].layers}
    widths = {}
    for name in sorted({member.layer for units in coupling.units.values() for unit in units for member in unit.members}):
        module = net.get_submodule(name)
        if not isinstance(module, nn.Conv2d | nn.Linear) or name in dropped:
            continue
        ins = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        lost_ins, lost_outs = (len(gone.get((name, role), ())) for role in (IN, OUT))
        depthwise = isinstance(module, nn.Conv2d) and module.groups > 1  # its outputs are its inputs
        widths[name] = (ins - (lost_outs if depthwise else lost_ins), len(module.weight) - lost_outs)
    return Structure(widths, tuple(coupling.blocks[name].tail for name in plan.removed_blocks))
