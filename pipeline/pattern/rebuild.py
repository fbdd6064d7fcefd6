"""The shape of a pruned network again, from the dense network and a plan: what its state dict is loaded into."""

from __future__ import annotations

from torch import Tensor, nn

from ...targets.stand_ins import stand_ins
from ..axes.capture import capture
from ..axes.coupling import couple
from ..axes.cutting.gate import check
from ..axes.cutting.surgery import cut
from ..errors import InputError
from ..evaluate.unit_prober import removed
from ..network.calling import Inputs, tensors_of
from ..options import Pattern
from ..signature import Signature
from ..types import Plan


def rebuilt(module: nn.Module, signature: Signature, plan: Plan) -> nn.Module:
    """The network without a plan's units and branches; its weights are what is left of the dense network's.

    Args:
        module: the dense network.
        signature: what it takes and gives.
        plan: of a run on it.

    Raises:
        InputError: the plan is of another network.
    """
    dense = module.to("cpu").eval()
    captured = capture(dense, _example(signature))
    if plan.pattern is not Pattern.CHANNEL:
        return captured.module
    checked = check(couple(captured))
    sizes = {group.name: len(group.units) for group in checked.coupling.groups}
    unknown = plan.kept.keys() - sizes.keys()
    unknown |= {*plan.removed_blocks} - {block.name for block in checked.coupling.blocks}
    if unknown:
        raise InputError(
            "the plan is of another network", found=f"no group {min(unknown)} in it", do="give the run's own factory"
        )
    return cut(checked.coupling, removed(plan, sizes), checked.sized)


def _example(signature: Signature) -> Inputs:
    tensors: tuple[Tensor, ...] = tensors_of(stand_ins(signature, 1))
    if signature.by_name:
        return {spec.name: tensor for spec, tensor in zip(signature.inputs, tensors, strict=True)}
    return tensors if len(tensors) > 1 else tensors[0]
