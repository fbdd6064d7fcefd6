"""The central property: for any choice of units and branches, what is cut out computes what zeros in place compute."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import nets
import pytest
import torch
from edge_compress.pipeline.axes.coupling import Plan
from edge_compress.pipeline.axes.cutting.gate import Checked
from edge_compress.pipeline.axes.cutting.surgery import cut, zeroed
from edge_compress.pipeline.axes.program import Program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn


@functools.cache
def exact(name: str) -> Checked:
    """In double precision, so that what is left of a difference is a mistake."""
    found = nets.checked(name)
    captured = found.coupling.walk.captured
    module = copy.deepcopy(captured.module).double()
    walk = copy.copy(found.coupling.walk)
    walk.captured = replace(captured, module=module)
    return replace(found, coupling=replace(found.coupling, walk=walk))


def without(found: Checked, plan: Plan, inputs: Tensor) -> Tensor:
    """What the whole network answers with zeros for units and branches."""
    module = zeroed(found.coupling, plan)
    program = Program.of(module, inputs)
    ends = {block.branch for block in found.coupling.left_out(plan)}
    with torch.no_grad():
        for node in program.nodes:
            if node.name in ends:
                program.env[node] = torch.zeros_like(program.value(node))
        answer: Tensor = program.outputs()[0]
    return answer


def difference(found: Checked, plan: Plan) -> float:
    inputs = nets.images().double()
    with torch.no_grad():
        expected, small = without(found, plan, inputs), cut(found.coupling, plan, found.sized).eval()(inputs)
    return float((expected - small).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", nets.NETS)
@given(data=st.data())
@settings(deadline=None, max_examples=6)
def test_the_cut_network_is_the_zeroed_network(name: str, data: st.DataObject) -> None:
    found = exact(name)
    plan: dict[str, list[int]] = {}
    for group, units in nets.units(found.coupling).items():
        gone = data.draw(st.sets(st.integers(0, len(units) - 1), max_size=len(units) - 1))
        plan |= {group: sorted(gone)} if gone else {}
    plan |= {block.name: [0] for block in found.coupling.blocks if data.draw(st.booleans())}
    assert difference(found, plan) < 1e-9
    before, after = (sum(p.numel() for p in net.parameters()) for net in (nets.subject(name)[0], cut(found.coupling, plan)))
    assert after < before or not plan


@pytest.mark.parametrize("name", ["OptionA", "Projection", "PreActivation"])
def test_a_branch_beside_a_projection_can_go(name: str) -> None:
    blocks = [block.name for block in nets.checked(name).coupling.blocks]
    assert "block:layer2.0.conv2" in blocks
    assert difference(exact(name), {"block:layer2.0.conv2": [0]}) < 1e-9


def test_a_branch_that_is_added_to_in_place_goes_from_a_stream_that_lost_channels() -> None:
    """torchvision's blocks: `y += identity`, so that zeros of the stream's present shape stand for the branch."""
    found = nets.checked("Projection")
    (block,) = [block for block in found.coupling.blocks if block.name == "block:layer2.1.conv2"]
    assert block.full
    plan = {block.name: [0], "layer2.0.conv2": [1, 4, 7]}
    assert difference(exact("Projection"), plan) < 1e-9
    small = cut(found.coupling, plan, found.sized)
    assert isinstance(small, nn.Module)
    assert small.get_submodule(block.modules[-1]).shape[0] == 7


def test_only_copies_for_trials_share_weights_with_the_dense_network() -> None:
    found = nets.checked("Projection")
    dense = found.coupling.walk.captured.module
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    plan = {"layer2.0.conv2": [1, 4, 7]}

    def shared(other: nn.Module) -> set[str]:
        own = dict(dense.named_parameters())
        return {name for name, value in other.named_parameters() if value is own[name]}

    masked = {name for name, value in cut(found.coupling, plan).named_parameters() if value.shape != before[name].shape}
    assert {"layer2.0.conv2.weight", "layer2.0.bn2.weight"} <= masked
    assert not shared(cut(found.coupling, plan, found.sized))
    for trial in (cut(found.coupling, plan, found.sized, shared=True), zeroed(found.coupling, plan, shared=True)):
        with torch.no_grad():
            trial(nets.images())
        assert shared(trial) == {name for name, _ in dense.named_parameters()} - masked
        assert not {id(b) for b in trial.buffers()} & {id(b) for b in dense.buffers()}
    assert not shared(zeroed(found.coupling, plan))
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
