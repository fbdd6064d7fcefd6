from __future__ import annotations

import copy
import functools

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.errors import BuildError, InputError
from edge_compress.pipeline.graph.coupling import Coupling, couple
from edge_compress.pipeline.graph.labels import Labels
from edge_compress.pipeline.graph.surgery import check_equivalence, cuts, masked, prune
from edge_compress.pipeline.graph.trace import canonical, layer_nodes
from edge_compress.pipeline.graph.units import Unit
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.types import Plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn


def plan(kept=None, blocks=()) -> Plan:
    return Plan(Pattern.CHANNEL, "", kept or {}, tuple(blocks))


@st.composite
def plans(draw: st.DrawFn, coupling: Coupling) -> Plan:
    kept = {}
    for name, units in coupling.units.items():
        if draw(st.booleans()):
            kept[name] = tuple(sorted(draw(st.sets(st.integers(0, len(units) - 1), min_size=1))))
    blocks = [name for name in coupling.blocks if draw(st.booleans())]
    return plan(kept, blocks)


@functools.cache
def exact(name: str) -> fx.GraphModule:
    """The network in float64: a channel that was taken for another shows, noise does not."""
    return copy.deepcopy(nets.subject(name)[0]).double()


def difference(a: nn.Module, b: nn.Module) -> float:
    inputs = nets.images().double()
    with torch.no_grad():
        expected = a(inputs)
        return float((expected - b(inputs)).abs().max() / expected.abs().max())


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", nets.NETS)
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_the_pruned_network_is_the_masked_network(name, data):
    """The central property: for any choice of channels and blocks, what is cut out computes what zeros in place compute."""
    net, (_, coupling) = exact(name), nets.subject(name)
    chosen = data.draw(plans(coupling))
    small = prune(net, coupling, chosen)
    assert difference(masked(net, coupling, chosen), small) < 1e-9
    gone = cuts(coupling, chosen.kept)
    if gone or chosen.removed_blocks:
        assert parameters(small) < parameters(net)


@pytest.mark.parametrize("name", nets.NETS)
def test_every_group_alone_and_all_blocks_together_can_be_cut(name):
    net, (_, coupling) = exact(name), nets.subject(name)
    for group, units in coupling.units.items():
        chosen = plan({group: (len(units) - 1,)})
        assert difference(masked(net, coupling, chosen), prune(net, coupling, chosen)) < 1e-9
    chosen = plan({g: (0,) for g in coupling.units}, coupling.blocks)
    small = prune(net, coupling, chosen)
    assert difference(masked(net, coupling, chosen), small) < 1e-9
    left = {str(n.target) for n, _ in layer_nodes(small)}
    assert not left & {layer for b in coupling.blocks.values() for layer in b.layers}
    assert not {n for n, m in small.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)} - left  # nothing unused is carried


def test_masking_silences_the_channel_where_it_is_made():
    """The other side of the comparison, by what runs through the network: the unit's outputs are zero, all others are not."""
    net, coupling = nets.subject("OptionA")
    quiet = masked(net, coupling, plan({"layer2.0.conv2": (0, 1, 2, 4, 5, 6, 7)}))
    seen: dict[str, torch.Tensor] = {}
    for name in ("layer2.0.bn2", "shortcut_0", "layer2.1.bn2"):
        quiet.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    quiet(nets.images())
    for out in seen.values():
        assert not out[:, 3].any()
    assert seen["layer2.0.bn2"][:, :3].abs().amax((0, 2, 3)).gt(0).all()
    assert len(seen) == 3


def test_an_inner_cut_is_what_one_would_write_by_hand():
    module, (net, coupling) = nets.drawn(nets.Projection), nets.subject("Projection")
    block, keep = module.layer2[1], [0, 3, 4, 9]
    with torch.no_grad():
        for channel in set(range(10)) - set(keep):
            block.conv2.weight[:, channel] = 0.0
        small = prune(net, coupling, plan({"layer2.1.conv1": tuple(keep)}))
        torch.testing.assert_close(small(nets.images()), module(nets.images()), rtol=1e-5, atol=1e-5)
    cut = small.get_submodule("layer2.1.conv1")
    assert torch.equal(cut.weight, nets.drawn(nets.Projection).layer2[1].conv1.weight[keep])


@pytest.mark.parametrize(("block", "stays"), [("block:layer1.1.conv2", None), ("block:layer2.0.conv2", "downsample")])
def test_a_removed_block_is_its_shortcut(block, stays):
    module, (net, coupling) = nets.drawn(nets.Projection), nets.subject("Projection")
    if stays is None:
        module.layer1[1] = nn.Identity()
    else:
        module.layer2[0] = nn.Sequential(module.layer2[0].downsample, nn.ReLU())
    with torch.no_grad():
        small = prune(net, coupling, plan(blocks=[block]))
        torch.testing.assert_close(small(nets.images()), module(nets.images()), rtol=1e-5, atol=1e-5)


def test_a_relu_is_not_done_twice_where_a_block_was():
    net, coupling = nets.subject("Projection")

    def relus(network: fx.GraphModule) -> int:
        return sum(
            1 for n in network.graph.nodes if n.op == "call_module" and isinstance(network.get_submodule(n.target), nn.ReLU)
        )

    both = prune(net, coupling, plan(blocks=["block:layer1.0.conv2", "block:layer1.1.conv2"]))
    assert relus(both) == relus(net) - 4  # two inside the branches, two after the additions
    projected = prune(net, coupling, plan(blocks=["block:layer2.0.conv2"]))
    assert relus(projected) == relus(net) - 1  # the projection has had none: the one after the addition stays


def test_pruning_leaves_the_network_and_shares_nothing_with_it():
    net, coupling = canonical(nets.drawn(nets.OptionA), nets.SHAPE), nets.subject("OptionA")[1]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    nodes = [(n.name, n.target) for n in net.graph.nodes]
    for make in (prune, masked):
        other = make(net, coupling, plan({"conv1": (0, 2)}, ["block:layer2.1.conv2"]))
        with torch.no_grad():
            for value in (*other.parameters(), *other.buffers()):
                value.zero_()
    assert [(n.name, n.target) for n in net.graph.nodes] == nodes
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_a_cut_layer_keeps_its_settings():
    net, coupling = canonical(nets.drawn(nets.SamePadding), nets.SHAPE), nets.subject("SamePadding")[1]
    small = prune(net, coupling, plan({"a": (1, 2), "b": (0, 6), "c": (5,)}))
    for name in "abc":
        old, new = net.get_submodule(name), small.get_submodule(name)
        for setting in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "training"):
            assert getattr(new, setting) == getattr(old, setting)
        assert new.weight.shape == (new.out_channels, new.in_channels, *new.kernel_size)
    norms = canonical(nets.drawn(nets.OptionA), nets.SHAPE)
    norm = norms.get_submodule("bn1")
    norm.eps, norm.momentum = 0.25, 0.5
    norm.num_batches_tracked.fill_(7)
    cut = prune(norms, nets.subject("OptionA")[1], plan({"conv1": (1, 3)})).get_submodule("bn1")
    assert (cut.num_features, cut.eps, cut.momentum, int(cut.num_batches_tracked)) == (2, 0.25, 0.5, 7)
    assert torch.equal(cut.running_var, norm.running_var[[1, 3]])


def test_given_weights_replace_those_of_the_kept_inputs():
    net, coupling = nets.subject("OptionA")
    given_weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))  # all outputs, three inputs
    small = prune(net, coupling, plan({"conv1": (0, 1, 3), "layer2.0.conv1": (2, 5)}), {"layer2.0.conv1": given_weight})
    assert torch.equal(small.get_submodule("layer2.0.conv1").weight, given_weight[[2, 5]])


def misaligned(original):
    """Labels of a zero-padded shortcut moved by one channel: what a coupling that looks at counts alone would do."""

    def label(self, node):
        original(self, node)
        if str(node.target).startswith("shortcut_"):
            self.at[node] = self.at[node][1:] + self.at[node][:1]

    return label


def test_a_misaligned_shortcut_is_caught_before_anything_is_built_on_it(monkeypatch):
    net, good = nets.subject("OptionA")
    monkeypatch.setattr(Labels, "_module", misaligned(Labels._module))
    bad = couple(net)
    assert [(g.name, g.size) for g in bad.groups] == [(g.name, g.size) for g in good.groups]  # it does not show in the counts
    chosen = plan({"layer2.0.conv2": (0, 2, 3, 6)})
    assert check_equivalence(net, good, chosen, nets.SHAPE) < 1e-4
    with pytest.raises(BuildError, match="is not the masked network") as caught:
        check_equivalence(net, bad, chosen, nets.SHAPE)
    assert "relative difference" in str(caught.value)


def test_a_pruned_network_that_does_not_run_is_an_error_too():
    net, coupling = nets.subject("OptionA")
    units = dict(coupling.units)
    forgetful = [Unit(tuple(s for s in u.slices if s.layer != "layer2.0.conv1")) for u in units["conv1"]]
    units["conv1"] = tuple(forgetful)
    with pytest.raises(BuildError, match="does not run"):
        check_equivalence(net, Coupling(coupling.groups, units, coupling.blocks), plan({"conv1": (0, 1)}), nets.SHAPE)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_check_lets_a_right_coupling_pass(name):
    net, coupling = nets.subject(name)
    kept = {g: tuple(range(0, len(u), 2)) for g, u in coupling.units.items()}
    assert check_equivalence(net, coupling, plan(kept), nets.SHAPE) < 1e-4


@pytest.mark.parametrize("kept", [(), (0, 4), (-1,)])
def test_a_plan_that_does_not_fit_is_refused_by_the_name_of_its_group(kept):
    net, coupling = nets.subject("OptionA")
    with pytest.raises(BuildError, match=r"plan of group conv1: .* expected 1\.\.4 of 0\.\.3"):
        prune(net, coupling, plan({"conv1": kept}))


def test_surgery_takes_no_masks():
    net, coupling = nets.subject("OptionA")
    with pytest.raises(BuildError, match="channels and blocks"):
        prune(net, coupling, Plan(Pattern.WEIGHT, "hasa"))


def test_cuts_name_every_place_once():
    _, coupling = nets.subject("OptionA")
    gone = cuts(coupling, {"layer2.1.conv1": (0, 1, 2, 5, 6, 7), "conv1": (0, 1, 2, 3)})
    assert all(indices == {3, 4} for indices in gone.values())
    norm = {(f"layer2.1.bn1.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")}
    assert set(gone) == {("layer2.1.conv1.weight", 0), ("layer2.1.conv2.weight", 1), *norm}


class TwoNorms(nn.Module):
    """One BatchNorm after two convolutions whose channels are independent."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nets.conv(3, 6), nets.conv(6, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, nets.CLASSES)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.b(F.relu(self.bn(self.a(x)))))).mean((2, 3)))


def test_a_shared_norm_is_never_cut_wrongly_in_silence():
    with pytest.raises(InputError, match="layer bn cannot be pruned"):
        canonical(nets.drawn(TwoNorms), nets.SHAPE)
