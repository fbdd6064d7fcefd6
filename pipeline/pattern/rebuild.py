"""The shape of a pruned network again, from the dense network and a plan: what its state dict is loaded into."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...targets.onnx.prober import stand_ins
from ..axes.capture import capture, plain
from ..axes.coupling import couple
from ..axes.cutting.gate import check
from ..axes.cutting.surgery import cut
from ..errors import BuildError, InputError
from ..evaluate.unit_evaluator import removed
from ..graph.coupling import couple as couple_traced
from ..graph.surgery import prune
from ..graph.trace import canonical
from ..network.calling import Inputs, tensors_of
from ..options import Pattern
from ..signature import Signature
from ..types import Plan


def rebuilt(module: nn.Module, signature: Signature, plan: Plan, state: Mapping[str, Tensor]) -> nn.Module:
    """The network without a plan's units and branches; its weights are what is left of the dense network's.

    Args:
        module: the dense network.
        signature: what it takes and gives.
        plan: of a run on it.
        state: weights of the pruned network; their names and shapes tell whether it was traced.

    Raises:
        InputError: the plan is of another network.
    """
    dense = module.to("cpu").eval()
    if signature.is_image_classifier:
        traced = _traced(dense, signature, plan)
        if traced is not None and _shapes(traced.state_dict()) == _shapes(state):
            return traced
    checked = check(couple(capture(dense, _example(signature))))
    sizes = {group.name: len(group.units) for group in checked.coupling.groups}
    unknown = plan.kept.keys() - sizes.keys()
    unknown |= {*plan.removed_blocks} - {block.name for block in checked.coupling.blocks}
    if unknown:
        raise InputError(
            "the plan is of another network", found=f"no group {min(unknown)} in it", do="give the run's own factory"
        )
    return cut(checked.coupling, removed(plan, sizes), checked.sized)


def _traced(module: nn.Module, signature: Signature, plan: Plan) -> nn.Module | None:
    """The traced network without a plan's channels and blocks; None where it cannot be traced or does not have them."""
    try:
        net = canonical(plain(module)[0], signature.image_shape)
        return net if plan.pattern is not Pattern.CHANNEL else prune(net, couple_traced(net), plan)
    except (InputError, BuildError, KeyError):
        return None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _example(signature: Signature) -> Inputs:
    tensors: tuple[Tensor, ...] = tensors_of(stand_ins(signature, 1))
    if signature.by_name:
        return {spec.name: tensor for spec, tensor in zip(signature.inputs, tensors, strict=True)}
    return tensors if len(tensors) > 1 else tensors[0]
