"""Weights on an int8 grid: what the quantizer then finds, and what the layer's outputs lose."""

import pytest
import torch
from edge_compress.pipeline.network.compute import Compute
from edge_compress.pipeline.reconstruct import gptq as rounding
from edge_compress.pipeline.reconstruct.gptq import round_rows, round_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def drawn(rows, k, seed, correlated=True):
    """A weight (rows, k) and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, k, generator=generator)
    mixed = torch.randn(k, k, generator=generator) if correlated else torch.eye(k)
    inputs = torch.randn(4 * k, k, generator=generator) @ mixed
    return weight, inputs.T @ inputs / len(inputs)


def error(found, weight, hessian):
    off = (found - weight).double()
    return float(((off @ hessian.double()) * off).sum())


def nearest(weight, steps):
    step = weight.abs().amax(1, keepdim=True) / steps
    return (weight / step).round() * step


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), k=st.integers(1, 12), steps=st.sampled_from([3, 63, 127]))
@settings(deadline=None, max_examples=60)
def test_a_quantizer_that_takes_its_scale_from_the_largest_weight_changes_nothing_any_more(seed, rows, k, steps):
    weight, hessian = drawn(rows, k, seed)
    found = round_rows(weight, hessian, steps)
    torch.testing.assert_close(found.abs().amax(1), weight.abs().amax(1))
    torch.testing.assert_close(nearest(found, steps), found)


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), k=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_the_layers_outputs_lose_no_more_than_by_rounding_to_the_nearest(seed, rows, k):
    weight, hessian = drawn(rows, k, seed)
    assert error(round_rows(weight, hessian, 7), weight, hessian) <= error(nearest(weight, 7), weight, hessian) * 1.0001 + 1e-9


def test_what_a_weight_loses_the_later_ones_make_up_for():
    weight, hessian = drawn(32, 64, 0)
    assert error(round_rows(weight, hessian), weight, hessian) < 0.5 * error(nearest(weight, 127), weight, hessian)


def test_inputs_that_have_nothing_to_do_with_each_other_leave_the_nearest():
    weight, _ = drawn(8, 16, 1)
    torch.testing.assert_close(round_rows(weight, torch.eye(16)), nearest(weight, 127))


@pytest.mark.parametrize("hessian", [torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 0.0, 0.0, 2.0]))])
def test_inputs_that_are_always_zero_are_no_obstacle(hessian):
    weight, _ = drawn(3, 4, 2)
    assert torch.isfinite(round_rows(weight, hessian)).all()
    assert torch.equal(round_rows(torch.zeros(3, 4), hessian), torch.zeros(3, 4))


def test_a_network_is_rounded_layer_by_layer_and_the_original_is_left_alone():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randn(20, 3, 6, 6).numpy()
    found = round_weights(net, [images[:7], images[7:]])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for name in ("0", "5"):
        weight = found.get_submodule(name).weight.flatten(1)
        torch.testing.assert_close(nearest(weight, 127), weight)
        assert not torch.equal(weight, net.get_submodule(name).weight.flatten(1))
    assert torch.equal(found.get_submodule("3").weight, net.get_submodule("3").weight)


def test_the_zeros_of_a_mask_stay():
    weight, hessian = drawn(8, 16, 3)
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.7
    assert (round_rows(weight * ~mask, hessian)[mask] == 0).all()


def test_a_hessian_that_cannot_be_factored_leaves_the_nearest_and_says_so(caplog):
    weight, _ = drawn(3, 4, 4)
    indefinite = torch.tensor([[1.0, 5.0, 0, 0], [5.0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    torch.testing.assert_close(round_rows(weight, indefinite), nearest(weight, 127))
    assert "rounded to the nearest value, not by GPTQ" in caplog.text


def test_a_layer_too_wide_for_its_hessian_is_left_alone_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr(rounding, "LARGEST", 20)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    found = round_weights(net, [torch.randn(30, 40).numpy()])
    assert torch.equal(found[0].weight, net[0].weight)
    torch.testing.assert_close(nearest(found[2].weight, 127), found[2].weight)
    assert not torch.equal(found[2].weight, net[2].weight)


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.other, self.fc = *(nn.Conv2d(c, 8, 3) for c in (3, 8, 8)), nn.Linear(8, 5)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.fc(self.other(self.one(self.first(x).relu()).relu()).mean((2, 3)))


class SamePadded(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])


class Computed(nn.Conv2d):
    """Divides its weight by its norm."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)


def pooled(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("make", "shape", "expected", "left"),
    [
        (Tied, (3, 9, 9), {"first", "fc"}, {"one", "other"}),
        (lambda: pooled(SamePadded(3, 8, 3, 2)), (3, 9, 9), {"0", "3"}, set()),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 5, 3)), (3, 16), {"0", "2"}, set()),
        (lambda: nn.Sequential(nn.Conv3d(1, 8, 3), nn.ReLU(), nn.Conv3d(8, 5, 2)), (1, 5, 5, 5), {"0", "2"}, set()),
        (Attending, (6, 16), {"attn.in_proj_", "attn.out_proj", "fc"}, set()),
        (lambda: pooled(Computed(3, 8, 3)), (3, 9, 9), {"3"}, {"0"}),
        (lambda: pooled(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))), (3, 9, 9), {"3"}, {"0"}),
    ],
    ids=["tied", "own padding", "1D", "3D", "attention", "computed", "parametrized"],
)
def test_a_layer_that_cannot_be_rounded_by_itself_keeps_no_other_from_it(make, shape, expected, left):
    torch.manual_seed(0)
    net, notes = make().eval(), []
    found = round_weights(net, [torch.randn(20, *shape)], note=notes.append)
    before = dict(net.named_parameters())
    changed = {name for name, value in found.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name + ("weight" if name.endswith("_") else ".weight") for name in expected}
    for name in changed:
        torch.testing.assert_close(nearest(found.get_parameter(name).flatten(1), 127), found.get_parameter(name).flatten(1))
    assert sorted(name for note in notes for name in left if f"{name}.weight" in note) == sorted(left)
    assert bool(notes) == bool(left)


def test_hessians_larger_than_the_memory_are_not_computed():
    torch.manual_seed(0)
    net, notes = nn.Sequential(nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 5)).eval(), []
    found = round_weights(net, [torch.randn(30, 40)], compute=Compute(memory_bytes=40 * 20**2), note=notes.append)
    assert torch.equal(found[0].weight, net[0].weight)
    assert not torch.equal(found[2].weight, net[2].weight)
    assert notes == ["Not rounded by GPTQ but to the nearest value: 0.weight (their Hessians are too large)."]
