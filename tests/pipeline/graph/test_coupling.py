from __future__ import annotations

from collections import Counter

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.graph.coupling import Coupling, couple
from edge_compress.pipeline.graph.trace import canonical, layer_nodes
from edge_compress.pipeline.graph.units import Unit
from torch import nn


def table(coupling: Coupling) -> list[tuple[str, str, int]]:
    return [(g.name, g.kind, g.size) for g in coupling.groups]


def places(unit: Unit) -> list[tuple[str, int, int]]:
    return [(s.parameter, s.axis, i) for s in unit.slices for i in s.indices]


def members(coupling: Coupling, group: str, unit: int) -> set[tuple[str, int, int]]:
    return set(places(coupling.units[group][unit]))


def norm(layer: str, channel: int) -> set[tuple[str, int, int]]:
    return {(f"{layer}.{name}", 0, channel) for name in ("weight", "bias", "running_mean", "running_var")}


def test_groups_of_a_network_with_padded_shortcuts():
    _, coupling = nets.subject("OptionA")
    assert table(coupling) == [
        ("conv1", "coupled", 4),
        ("layer1.0.conv1", "inner", 4),
        ("layer2.0.conv1", "inner", 8),
        ("layer2.0.conv2", "coupled", 8),
        ("layer2.1.conv1", "inner", 8),
        ("layer3.0.conv1", "inner", 12),
        ("layer3.0.conv2", "coupled", 12),
        ("layer3.1.conv1", "inner", 12),
        ("block:layer1.0.conv2", "block", 1),
        ("block:layer2.0.conv2", "block", 1),
        ("block:layer2.1.conv2", "block", 1),
        ("block:layer3.0.conv2", "block", 1),
        ("block:layer3.1.conv2", "block", 1),
    ]
    groups = {g.name: g for g in coupling.groups}
    assert groups["conv1"].producers == ("conv1", "layer1.0.conv2")
    assert groups["conv1"].consumers == ("layer1.0.conv1", "layer2.0.conv1", "shortcut_0")
    assert groups["layer2.0.conv2"].producers == ("layer2.0.conv2", "shortcut_0", "layer2.1.conv2")
    assert groups["layer3.0.conv2"].consumers == ("layer3.1.conv1", "linear")
    assert groups["layer2.1.conv1"].producers == ("layer2.1.conv1",)
    assert groups["layer2.1.conv1"].consumers == ("layer2.1.conv2",)
    assert groups["block:layer2.1.conv2"].producers == ("layer2.1.conv1", "layer2.1.conv2")


def test_a_padded_shortcut_couples_the_channels_it_is_added_to():
    """Channel c of the narrow shortcut is channel c + 2 of the wide one only through the convolution's weights."""
    _, coupling = nets.subject("OptionA")
    assert members(coupling, "conv1", 1) == {
        *{("conv1.weight", 0, 1), ("layer1.0.conv1.weight", 1, 1), ("layer1.0.conv2.weight", 0, 1)},
        *{("layer2.0.conv1.weight", 1, 1), ("shortcut_0.weight", 1, 1)},
        *norm("bn1", 1),
        *norm("layer1.0.bn2", 1),
    }
    wide = members(coupling, "layer2.0.conv2", 5)
    assert {("layer2.0.conv2.weight", 0, 5), ("shortcut_0.weight", 0, 5)} <= wide
    assert {("shortcut_1.weight", 1, 5), ("layer2.1.conv1.weight", 1, 5)} <= wide


def test_depthwise_layers_go_with_the_layer_before_them():
    _, coupling = nets.subject("Mobile")
    groups = {g.name: g for g in coupling.groups}
    assert groups["blocks.1.expand.0"].producers == ("blocks.1.expand.0",)
    assert groups["blocks.1.expand.0"].consumers == ("blocks.1.project.0",)
    unit = members(coupling, "blocks.1.expand.0", 7)
    assert {("blocks.1.depthwise.0.weight", 0, 7), ("blocks.1.project.0.weight", 1, 7)} | norm("blocks.1.depthwise.1", 7) <= unit
    assert groups["blocks.0.project.0"].kind == "coupled"


def test_a_gate_goes_with_what_it_gates():
    _, coupling = nets.subject("Gated")
    coupled = next(g for g in coupling.groups if g.name == "stem.0")
    assert {"blocks.0.conv2", "blocks.0.se.expand"} <= set(coupled.producers)
    assert {"blocks.0.se.reduce", "blocks.1.conv1", "fc"} <= set(coupled.consumers)
    assert members(coupling, "blocks.0.se.reduce", 2) == {
        *{("blocks.0.se.reduce.weight", 0, 2), ("blocks.0.se.reduce.bias", 0, 2), ("blocks.0.se.expand.weight", 1, 2)}
    }


def test_a_channel_is_found_again_behind_concatenations():
    _, coupling = nets.subject("Concatenated")
    unit = members(coupling, "dense.0.conv2", 2)  # channel 2 of the second part: 5 + 2 in what is joined
    assert {(name, index) for name, axis, index in unit if axis == 1} == {("dense.1.conv1.weight", 7), ("transition.2.weight", 7)}
    assert norm("dense.1.bn1", 7) | norm("transition.0", 7) <= unit
    last = members(coupling, "dense.1.conv2", 0)
    assert {(name, index) for name, axis, index in last if axis == 1} == {("transition.2.weight", 8)}


def test_a_channel_takes_all_its_flattened_positions_with_it():
    _, coupling = nets.subject("Vgg")
    unit = members(coupling, "features.4", 3)
    assert sorted(index for name, axis, index in unit if name == "classifier.0.weight") == [12, 13, 14, 15]


def test_coupled_channels_of_pre_activation_blocks_carry_their_norms():
    _, coupling = nets.subject("PreActivation")
    unit = members(coupling, "conv", 0)
    assert norm("layer1.0.bn1", 0) | norm("layer1.1.bn1", 0) | {("layer2.0.project.weight", 1, 0)} <= unit
    assert not norm("layer1.0.bn2", 0) & unit


NOT_TO_BE_CUT = {  # layers whose outputs must stay: they are the answer, or something that is not understood reads them
    "OptionA": {"linear"},
    "Projection": {"fc"},
    "PreActivation": {"fc"},
    "Mobile": {"fc"},
    "Gated": {"fc"},
    "Concatenated": {"fc"},
    "Vgg": {"classifier.6"},
    "Bare": {"fc"},
    "Grouped": {"a", "grouped", "fc"},
    "Normalised": {"stem", "up", "down", "fc"},
    "ConvOut": {"out"},
    "ClippedBranch": {"fc"},
    "SamePadding": {"fc"},
}


@pytest.mark.parametrize("name", nets.NETS)
def test_layers_that_cannot_be_cut_are_in_no_group_and_all_others_are(name):
    net, coupling = nets.subject(name)
    cut = {s.layer for units in coupling.units.values() for u in units for s in u.slices if s.axis == 0}
    assert {str(n.target) for n, _ in layer_nodes(net)} - cut == NOT_TO_BE_CUT[name]
    producers = {p for g in coupling.groups if g.kind != "block" for p in g.producers}
    assert not producers & NOT_TO_BE_CUT[name]


@pytest.mark.parametrize("name", nets.NETS)
def test_every_place_belongs_to_one_unit_and_exists(name):
    net, coupling = nets.subject(name)
    counts = Counter(place for units in coupling.units.values() for u in units for place in places(u))
    assert max(counts.values()) == 1
    tensors = net.state_dict()
    assert all(index < tensors[name].shape[axis] for name, axis, index in counts)
    for group in coupling.groups:
        if group.kind == "block":
            assert group.size == 1
            assert group.producers == coupling.blocks[group.name].layers
        else:
            assert len(coupling.units[group.name]) == group.size
            assert group.kind == "inner" or len(group.producers) > 1
            for index, unit in enumerate(coupling.units[group.name]):
                assert (f"{group.producers[0]}.weight", 0, index) in places(unit)


@pytest.mark.parametrize("name", nets.NETS)
def test_groups_come_in_the_order_of_their_first_layer_and_blocks_last(name):
    net, coupling = nets.subject(name)
    order = {str(n.target): i for i, (n, _) in enumerate(layer_nodes(net))}
    channels = [g for g in coupling.groups if g.kind != "block"]
    assert list(coupling.groups[: len(channels)]) == channels
    firsts = [order[g.producers[0]] for g in channels]
    assert firsts == sorted(firsts)
    assert len({g.name for g in coupling.groups}) == len(coupling.groups)


def test_blocks_say_what_stays_and_where_they_end():
    net, coupling = nets.subject("Projection")
    block = coupling.blocks["block:layer2.0.conv2"]
    assert (block.tail, block.layers) == ("layer2.0.conv2", ("layer2.0.conv1", "layer2.0.conv2"))
    nodes = {n.name: n for n in net.graph.nodes}
    branch, shortcut = (nodes[block.branch], *(n for n in nodes[block.addition].all_input_nodes if n.name != block.branch))
    assert (str(branch.target), str(shortcut.target)) == ("layer2.0.bn2", "layer2.0.downsample.1")
    assert not nets.subject("Vgg")[1].blocks
    assert not nets.subject("Concatenated")[1].blocks


class Nested(nn.Module):
    """A residual branch that holds a residual branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = (nets.conv(i, 6) for i in (3, 6, 6, 6))
        self.fc = nn.Linear(6, nets.CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.a(x))
        y = y + self.b(y)
        return self.fc((x + self.c(y)).mean((2, 3)))


def test_of_nested_branches_only_one_can_be_removed():
    coupling = couple(canonical(nets.drawn(Nested), nets.SHAPE))
    assert list(coupling.blocks) == ["block:b"]


class TwoReaders(nn.Module):
    """The inner layer is read outside its branch: the branch cannot go."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nets.conv(3, 6), nets.conv(6, 6), nets.conv(6, 6)
        self.fc = nn.Linear(6, nets.CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        inner = F.relu(self.a(x))
        return self.fc((F.relu(x + self.b(inner)) * inner).mean((2, 3)))


def test_a_branch_keeps_what_is_read_elsewhere():
    coupling = couple(canonical(nets.drawn(TwoReaders), nets.SHAPE))
    assert [b.layers for b in coupling.blocks.values()] == [("b",)]


class Partly(nn.Module):
    """Of the first layer's channels, half are joined with the second's: two kinds of channels in one layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nets.conv(3, 4), nets.conv(3, 4), nets.conv(8, 6)
        self.fc = nn.Linear(6, nets.CLASSES)

    def forward(self, x):
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        return self.fc(F.relu(self.c(torch.cat([a, a + b], 1))).mean((2, 3)))


def test_channels_of_one_layer_that_are_coupled_in_two_places_go_from_both():
    coupling = couple(canonical(nets.drawn(Partly), nets.SHAPE))
    assert members(coupling, "a", 1) == {("a.weight", 0, 1), ("b.weight", 0, 1), ("c.weight", 1, 1), ("c.weight", 1, 5)}


def test_nothing_to_remove_is_refused_by_the_name_of_the_layer():
    with pytest.raises(InputError) as caught:
        couple(canonical(nets.drawn(nets.NothingToCut), nets.SHAPE))
    assert "layer only" in str(caught.value)
    assert "output" in str(caught.value)
    assert "\n" not in str(caught.value)
