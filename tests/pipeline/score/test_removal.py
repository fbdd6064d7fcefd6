"""Curvature along the removal of whole units, against the quadratic form of each unit's own weight vector."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import nets
import numpy as np
import pytest
import torch
from edge_compress.pipeline.axes.types import Unit
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.exact_mode import Batch
from edge_compress.pipeline.score import curvature, removal
from edge_compress.pipeline.score.removal import removal_curvature
from scipy.stats import spearmanr
from torch import Tensor, nn


def batches(inputs: Tensor, *sizes: int) -> list[Batch]:
    return [(x, torch.zeros(len(x), dtype=torch.long)) for x in inputs.split(list(sizes) or len(inputs))]


def double(name: str):
    net, coupling = nets.subject(name)
    return copy.deepcopy(net).double(), coupling


def derivatives(net: nn.Module, units: Sequence[Unit], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, classes), and their derivatives (units, N, classes) along the weights that read each unit."""
    weights = {f"{n}.weight": m.weight.detach() for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}

    def logits(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, values, (inputs,))

    found = []
    for unit in units:
        v = {key: torch.zeros_like(w) for key, w in weights.items()}
        for s in unit.slices:
            if s.axis == 1:
                v[s.parameter][:, list(s.indices)] = weights[s.parameter][:, list(s.indices)]
        found.append(torch.func.jvp(logits, (weights,), (v,))[1])
    return logits(weights).detach(), torch.stack(found).detach()


@pytest.mark.parametrize("name", [name for name in nets.NETS if name != "ConvOut"])  # that one is no classifier
def test_it_is_the_square_of_the_derivative_along_all_weights_that_read_the_unit(name, monkeypatch):
    net, coupling = double(name)
    inputs = nets.images(5).double()
    monkeypatch.setattr(removal, "probing_loss", lambda logits, *_: logits[:, 2].sum())
    found = removal_curvature(net, nets.units(coupling), batches(inputs, 2, 3))
    assert set(found) == set(nets.units(coupling))
    for group, units in nets.units(coupling).items():
        _, along = derivatives(net, units, inputs)
        torch.testing.assert_close(found[group], along[:, :, 2].square().mean(1), rtol=1e-8, atol=1e-14)
        assert found[group].max() > 0


def test_on_average_it_is_the_gauss_newton_form_and_not_the_sum_of_its_diagonal():
    net, coupling = double("OptionA")
    inputs = nets.images(4).double()
    many = batches(inputs.repeat(250, 1, 1, 1))
    found = removal_curvature(net, nets.units(coupling), many, draws=6)  # 1,500 for each image
    diagonal = curvature.gauss_newton(net, many)
    streams = [g for g in coupling.groups if g.kind == "stream"]
    assert any(len({s.layer for s in g.units[0].slices if s.axis == 1}) > 1 for g in streams)
    sums, forms = [], []
    for group, units in nets.units(coupling).items():
        logits, along = derivatives(net, units, inputs)
        p = (logits / removal.TEMPERATURE).softmax(1)
        exact = ((p * along.square()).sum(2) - (p * along).sum(2).square()).mean(1)
        np.testing.assert_allclose(found[group], exact, rtol=0.2)
        for unit in units:
            slices = [(s.layer, i) for s in unit.slices if s.axis == 1 for i in s.indices]
            w = {n: net.get_submodule(n).weight.detach()[:, i] for n, i in slices}
            sums.append(float(sum((w[n].square() * diagonal[n][:, i]).sum() for n, i in slices)))
        forms += exact.tolist()
    assert spearmanr(sums, forms).statistic < 0.95  # the test can tell the two apart


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_probing_loss_has_the_gauss_newton_matrix_as_its_mean_square(temperature):
    logits = torch.tensor([[2.0, 0.0, -1.0, 4.0]], dtype=torch.float64).repeat(40_000, 1).requires_grad_()
    loss = curvature.probing_loss(logits, torch.Generator().manual_seed(0), temperature)
    (gradient,) = torch.autograd.grad(loss, logits)
    p = (logits[0].detach() / temperature).softmax(0)
    torch.testing.assert_close(gradient.T @ gradient / len(logits), p.diag() - p[:, None] * p, rtol=0.05, atol=1e-3)


def test_the_network_is_left_as_it_was_and_batches_do_not_matter(monkeypatch):
    net, coupling = double("Projection")
    net.train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    monkeypatch.setattr(removal, "probing_loss", lambda logits, *_: logits[:, 1].sum())
    inputs = nets.images(6).double()
    one = removal_curvature(net, nets.units(coupling), batches(inputs))
    for group, found in removal_curvature(net, nets.units(coupling), batches(inputs, 1, 3, 2), draws=2).items():
        torch.testing.assert_close(found, one[group])
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("draws", [1, 3])
def test_the_signs_of_an_image_do_not_depend_on_the_size_of_the_batches(draws: int) -> None:
    net, coupling = double("Vgg")
    inputs = nets.images(12).double()
    whole, parts = (removal_curvature(net, nets.units(coupling), batches(inputs, *sizes), draws) for sizes in ((12,), (5, 4, 3)))
    for group, values in whole.items():
        torch.testing.assert_close(parts[group], values)


def test_same_seed_same_bits_and_another_seed_another_estimate():
    net, coupling = nets.subject("Vgg")
    first, again, other = (removal_curvature(net, nets.units(coupling), batches(nets.images(4)), seed=s) for s in (1, 1, 2))
    for group in first:
        assert torch.equal(first[group], again[group])
        assert not torch.allclose(first[group], other[group], rtol=1e-3)


def test_a_unit_that_nothing_reads_costs_nothing():
    net, coupling = nets.subject("Vgg")
    group, units = next(iter(nets.units(coupling).items()))
    unread = Unit(tuple(s for s in units[0].slices if s.axis != 1))
    found = removal_curvature(net, {group: (unread, units[1])}, batches(nets.images(4)))[group]
    assert found[0] == 0 < found[1]


def test_what_cannot_be_estimated_is_refused():
    net, coupling = nets.subject("Vgg")
    with pytest.raises(InputError, match="calibration images: found none"):
        removal_curvature(net, nets.units(coupling), [])
    with pytest.raises(ValueError, match="draws 0"):
        removal_curvature(net, nets.units(coupling), batches(nets.images(2)), draws=0)
