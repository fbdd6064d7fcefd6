from __future__ import annotations

from collections import Counter

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.graph.coupling import IN, NORM, OUT, Coupling, Member, couple
from edge_compress.pipeline.graph.trace import canonical, layer_nodes
from torch import nn


def table(coupling: Coupling) -> list[tuple[str, str, int]]:
    return [(g.name, g.kind, g.size) for g in coupling.groups]


def members(coupling: Coupling, group: str, unit: int) -> set[tuple[str, int, int]]:
    return {(m.layer, m.role, m.index) for m in coupling.units[group][unit].members}


def test_groups_of_a_network_with_padded_shortcuts():
    _, coupling = nets.subject("OptionA")
    assert table(coupling) == [
        ("conv1", "stream", 4),
        ("layer1.0.conv1", "inner", 4),
        ("layer2.0.conv1", "inner", 8),
        ("layer2.0.conv2", "stream", 8),
        ("layer2.1.conv1", "inner", 8),
        ("layer3.0.conv1", "inner", 12),
        ("layer3.0.conv2", "stream", 12),
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
    """Channel c of the narrow stream is channel c + 2 of the wide one only through the convolution's weights."""
    _, coupling = nets.subject("OptionA")
    assert members(coupling, "conv1", 1) == {
        *{("conv1", OUT, 1), ("bn1", NORM, 1), ("layer1.0.conv1", IN, 1), ("layer1.0.conv2", OUT, 1), ("layer1.0.bn2", NORM, 1)},
        *{("layer2.0.conv1", IN, 1), ("shortcut_0", IN, 1)},
    }
    wide = members(coupling, "layer2.0.conv2", 5)
    assert {("layer2.0.conv2", OUT, 5), ("shortcut_0", OUT, 5), ("shortcut_1", IN, 5), ("layer2.1.conv1", IN, 5)} <= wide


def test_depthwise_layers_go_with_the_layer_before_them():
    _, coupling = nets.subject("Mobile")
    groups = {g.name: g for g in coupling.groups}
    assert groups["blocks.1.expand.0"].producers == ("blocks.1.expand.0",)
    assert groups["blocks.1.expand.0"].consumers == ("blocks.1.project.0",)
    unit = members(coupling, "blocks.1.expand.0", 7)
    assert {("blocks.1.depthwise.0", OUT, 7), ("blocks.1.depthwise.1", NORM, 7), ("blocks.1.project.0", IN, 7)} <= unit
    assert groups["blocks.0.project.0"].kind == "stream"


def test_a_gate_goes_with_what_it_gates():
    _, coupling = nets.subject("Gated")
    stream = next(g for g in coupling.groups if g.name == "stem.0")
    assert {"blocks.0.conv2", "blocks.0.se.expand"} <= set(stream.producers)
    assert {"blocks.0.se.reduce", "blocks.1.conv1", "fc"} <= set(stream.consumers)
    assert members(coupling, "blocks.0.se.reduce", 2) == {("blocks.0.se.reduce", OUT, 2), ("blocks.0.se.expand", IN, 2)}


def test_a_channel_is_found_again_behind_concatenations():
    _, coupling = nets.subject("Concatenated")
    unit = members(coupling, "dense.0.conv2", 2)  # channel 2 of the second part: 5 + 2 in what is joined
    assert {(layer, index) for layer, role, index in unit if role == IN} == {("dense.1.conv1", 7), ("transition.2", 7)}
    assert {("dense.1.bn1", NORM, 7), ("transition.0", NORM, 7)} <= unit
    last = members(coupling, "dense.1.conv2", 0)
    assert {(layer, index) for layer, role, index in last if role == IN} == {("transition.2", 8)}


def test_a_channel_takes_all_its_flattened_positions_with_it():
    _, coupling = nets.subject("Vgg")
    unit = members(coupling, "features.4", 3)
    assert sorted(index for layer, role, index in unit if layer == "classifier.0") == [12, 13, 14, 15]


def test_pre_activation_streams_carry_their_norms():
    _, coupling = nets.subject("PreActivation")
    unit = members(coupling, "conv", 0)
    assert {("layer1.0.bn1", NORM, 0), ("layer1.1.bn1", NORM, 0), ("layer2.0.project", IN, 0)} <= unit
    assert ("layer1.0.bn2", NORM, 0) not in unit


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
    cut = {m.layer for units in coupling.units.values() for u in units for m in u.members if m.role == OUT}
    assert {str(n.target) for n, _ in layer_nodes(net)} - cut == NOT_TO_BE_CUT[name]
    producers = {p for g in coupling.groups if g.kind != "block" for p in g.producers}
    assert not producers & NOT_TO_BE_CUT[name]


@pytest.mark.parametrize("name", nets.NETS)
def test_every_place_belongs_to_one_unit_and_exists(name):
    net, coupling = nets.subject(name)
    places = Counter(m for units in coupling.units.values() for u in units for m in u.members)
    assert max(places.values()) == 1
    for place in places:
        module = net.get_submodule(place.layer)
        if place.role == NORM:
            assert isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
            assert place.index < module.num_features
        else:
            assert place.index < module.weight.shape[place.role]
    for group in coupling.groups:
        if group.kind == "block":
            assert group.size == 1
            assert group.producers == coupling.blocks[group.name].layers
        else:
            assert len(coupling.units[group.name]) == group.size
            assert (group.kind == "stream") == (len(group.producers) > 1)
            for index, unit in enumerate(coupling.units[group.name]):
                assert Member(group.producers[0], OUT, index) in unit.members


@pytest.mark.parametrize("name", nets.NETS)
def test_groups_come_in_the_order_of_their_first_layer_and_blocks_last(name):
    net, coupling = nets.subject(name)
    order = {str(n.target): i for i, (n, _) in enumerate(layer_nodes(net))}
    channels = [g for g in coupling.groups if g.kind != "block"]
    assert list(coupling.groups[: len(channels)]) == channels
    places = [order[g.producers[0]] for g in channels]
    assert places == sorted(places)
    assert len({g.name for g in coupling.groups}) == len(coupling.groups)


def test_blocks_say_what_stays_and_where_they_end():
    net, coupling = nets.subject("Projection")
    block = coupling.blocks["block:layer2.0.conv2"]
    assert (block.tail, block.layers) == ("layer2.0.conv2", ("layer2.0.conv1", "layer2.0.conv2"))
    nodes = {n.name: n for n in net.graph.nodes}
    assert str(nodes[block.shortcut].target) == "layer2.0.downsample.1"
    assert nodes[block.shortcut] in nodes[block.addition].all_input_nodes
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
    assert members(coupling, "a", 1) == {("a", OUT, 1), ("b", OUT, 1), ("c", IN, 1), ("c", IN, 5)}


def test_nothing_to_remove_is_refused_by_the_name_of_the_layer():
    with pytest.raises(InputError) as caught:
        couple(canonical(nets.drawn(nets.NothingToCut), nets.SHAPE))
    assert "layer only" in str(caught.value)
    assert "output" in str(caught.value)
    assert "\n" not in str(caught.value)
