from __future__ import annotations

import copy
import operator

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.graph.trace import canonical, is_add, is_relu, layer_nodes, shape_of, submodule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn


class Padded(nn.Module):
    """One convolution, then channels padded with zeros (or something else), then another."""

    def __init__(self, pad, step=1, subsample=None, **how):
        super().__init__()
        front, back = pad[4:] if len(pad) == 6 else (0, 0)
        self.first, self.last = nets.conv(3, 4), nets.conv(4 + front + back, 5)
        self.pad, self.how = pad, how
        self.index = subsample or (slice(None), slice(None), slice(None, None, step), slice(None, None, step))

    def forward(self, x):
        x = F.relu(self.first(x))[self.index]
        return self.last(F.pad(x, self.pad, **self.how)).mean((2, 3))


def inserted(net: fx.GraphModule) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_children() if name.startswith("shortcut_")}


@pytest.mark.parametrize("name", nets.NETS)
def test_the_canonical_network_computes_the_same_and_leaves_the_argument_alone(name):
    module = nets.drawn(nets.NETS[name])
    module.train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    net = canonical(module, nets.SHAPE)
    assert all(m.training for m in module.modules())
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
    assert not any(m.training for m in net.modules() if not list(m.children()))
    with torch.no_grad():
        expected, found = module.eval()(nets.images()), net(nets.images())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 0.01  # the answers say something about the network
    with torch.no_grad():  # nothing is shared with the argument
        for parameter in net.parameters():
            parameter.zero_()
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name", nets.NETS)
def test_names_of_the_users_modules_stay(name):
    module = nets.drawn(nets.NETS[name])
    layers = {n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    net, _ = nets.subject(name)
    found = [str(node.target) for node, _ in layer_nodes(net)]
    assert len(found) == len(set(found))
    assert {n for n in found if not n.startswith("shortcut_")} == layers


def test_zero_padded_shortcuts_become_convolutions_that_select():
    net, _ = nets.subject("OptionA")
    first, second = inserted(net).values()
    assert (first.in_channels, first.out_channels, first.stride, first.bias) == (4, 8, (2, 2), None)
    assert (second.in_channels, second.out_channels, second.stride, second.bias) == (8, 12, (2, 2), None)
    expected = torch.zeros(8, 4, 1, 1)
    for channel in range(4):
        expected[channel + 2, channel] = 1.0
    assert torch.equal(first.weight, expected)
    assert first.weight.requires_grad  # the selection is where training starts from
    assert not [n for n in net.graph.nodes if n.op == "call_function" and n.target in (F.pad, torch._C._nn.pad, operator.getitem)]


@given(
    front=st.integers(0, 3),
    back=st.integers(0, 3),
    step=st.integers(1, 3),
    value=st.sampled_from([None, 0.0]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=20)
def test_any_padding_of_channels_is_selected_the_same(front, back, step, value, seed):
    module = nets.drawn(lambda: Padded((0, 0, 0, 0, front, back), step, value=value), seed)
    net = canonical(module, nets.SHAPE)
    assert len(inserted(net)) == 1
    with torch.no_grad():
        torch.testing.assert_close(net(nets.images()), module(nets.images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pad", "how"),
    [
        ((1, 1, 0, 0, 1, 1), {}),  # of the map as well
        ((0, 0, 0, 0, 1, 1), {"value": 0.5}),  # not zeros
        ((1, 1, 1, 1), {}),  # of the map only
        ((0, 0, 0, 0, -1, 1), {}),  # cuts a channel away
    ],
)
def test_other_padding_stays_as_it_is(pad, how):
    module = nets.drawn(lambda: Padded(pad, **how))
    net = canonical(module, nets.SHAPE)
    assert not inserted(net)
    with torch.no_grad():
        torch.testing.assert_close(net(nets.images()), module(nets.images()))


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(1, None, 2), slice(1, None, 2)),
        (slice(None), slice(None), slice(None, None, 2), slice(None)),
        (slice(None), slice(None), slice(None, 4, 2), slice(None, 4, 2)),
    ],
)
def test_only_plain_subsampling_becomes_a_stride(index):
    module = nets.drawn(lambda: Padded((0, 0, 0, 0, 1, 1), subsample=index))
    net = canonical(module, nets.SHAPE)
    assert [m.stride for m in inserted(net).values()] == [(1, 1)]
    with torch.no_grad():
        torch.testing.assert_close(net(nets.images()), module(nets.images()))


def test_an_inserted_layer_has_the_networks_number_format():
    module = nets.drawn(nets.OptionA)
    net = canonical(module, nets.SHAPE)
    assert {p.dtype for p in inserted(net)["shortcut_0"].parameters()} == {torch.float32}
    assert not inserted(net)["shortcut_0"].training


@pytest.mark.parametrize(
    ("make", "layer", "why"),
    [
        (nets.SharedLayer, "layer body ", "used twice"),
        (nets.TiedWeights, "layer other ", "shared with one"),
        (nets.SharedNorm, "layer norm ", "used 2 times"),
        (nets.ControlFlow, "gate.0", "control flow"),
        (nets.NoLayer, "no prunable layer", "at least one Conv2d or Linear"),
    ],
)
def test_a_network_that_cannot_be_cut_is_refused_in_one_line_that_names_the_layer(make, layer, why):
    module = nets.drawn(make)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InputError) as caught:
        canonical(module, nets.SHAPE)
    text = str(caught.value)
    assert layer in text
    assert why in text
    assert "\n" not in text
    assert caught.value.exit_code == 2
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


def test_every_node_knows_its_shape_for_two_images():
    net, _ = nets.subject("OptionA")
    shapes = {str(n.target): shape_of(n) for n, _ in layer_nodes(net)}
    assert shapes["conv1"] == (2, 4, 8, 8)
    assert shapes["shortcut_0"] == shapes["layer2.0.conv2"] == (2, 8, 4, 4)
    assert shapes["linear"] == (2, nets.CLASSES)
    sizes, _ = nets.subject("Vgg")
    assert None in [shape_of(n) for n in sizes.graph.nodes]  # x.size(0) is no tensor


class Arithmetic(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nets.conv(3, 3), nn.ReLU()

    def forward(self, x):
        a = self.conv(x)
        a = self.act(F.relu(torch.relu(a.relu())))
        return F.gelu(torch.add(a + x, x) * 2.0) + 1.0


def test_sums_of_tensors_and_relus_are_known_however_they_are_written():
    net = canonical(nets.drawn(Arithmetic), nets.SHAPE)
    sums = [n.name for n in net.graph.nodes if is_add(n)]
    assert len(sums) == 2  # and not the sum with a number
    relus = [n for n in net.graph.nodes if is_relu(net, n)]
    assert len(relus) == 4
    assert [type(submodule(net, n)) for n in relus if n.op == "call_module"] == [nn.ReLU]
    assert submodule(net, next(iter(net.graph.nodes))) is None
