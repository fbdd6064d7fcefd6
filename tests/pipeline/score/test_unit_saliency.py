"""OBS saliency is what a layer's outputs really lose when one unit's inputs go and the others are re-fit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.axes.coupling import Coupling, couple
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.compute import Compute
from edge_compress.pipeline.score import unit_saliency as saliency
from edge_compress.pipeline.score.layer_moments import LayerMoments
from small_transformers import TRANSFORMERS
from torch import nn


def coupled(net: nn.Module, inputs: torch.Tensor) -> Coupling:
    return couple(capture(net.eval(), inputs[:1]))


@pytest.mark.parametrize("bias", [True, False])
def test_saliency_is_the_loss_of_the_best_fit_without_the_unit(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "DAMPING", 1e-9)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 4, bias=bias))
    inputs = torch.randn(400, 1, 8, 8)
    coupling = coupled(net, inputs)
    found = saliency.unit_saliency(coupling, LayerMoments(coupling.walk.captured.module, inputs), "hasa", 0)["1"]
    with torch.no_grad():
        hidden = net[2](net[1](net[0](inputs))).double()
        outputs = hidden @ net[3].weight.double().T
        centred = outputs - outputs.mean(0) if bias else outputs
        losses = []
        for unit in range(6):
            left = hidden[:, [k for k in range(6) if k != unit]]
            left = torch.cat([left, torch.ones(len(left), 1, dtype=left.dtype)], 1) if bias else left
            losses.append(float((left @ torch.linalg.lstsq(left, outputs).solution - outputs).square().sum()))
    torch.testing.assert_close(found, torch.tensor(losses, dtype=torch.float64) / centred.square().sum(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["packed", "shared_keys", "torch_attention", "gated_mlp"])
def test_every_open_group_gets_a_score_for_each_unit(name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(60, 1, 8, 8)
    coupling = coupled(TRANSFORMERS[name](), inputs)
    moments = LayerMoments(coupling.walk.captured.module, inputs)
    for score in ("hasa", "magnitude", "random"):
        found = saliency.unit_saliency(coupling, moments, score, 0)
        assert {n: len(s) for n, s in found.items()} == {g.name: len(g.units) for g in coupling.open_groups()}
        assert all(bool((s >= 0).all()) and len(set(s.tolist())) > 1 for s in found.values())


def test_a_dead_dimension_of_queries_and_keys_goes_first() -> None:
    torch.manual_seed(0)
    net = TRANSFORMERS["apart"]()
    inputs = torch.randn(60, 1, 8, 8)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "key" in name:
                parameter.view(4, 8, -1)[:, 5] = 0.0
    coupling = coupled(net, inputs)
    found = saliency.unit_saliency(coupling, LayerMoments(coupling.walk.captured.module, inputs), "hasa", 0)
    dims = {g.name for g in coupling.open_groups() if g.kind == "head_dim"}
    assert dims
    assert all(int(found[name].argmin()) == 5 for name in dims)


def test_the_published_score_is_refused_by_name() -> None:
    inputs = torch.randn(60, 1, 8, 8)
    coupling = coupled(nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 4)), inputs)
    with pytest.raises(InputError, match="published"):
        saliency.unit_saliency(coupling, LayerMoments(coupling.walk.captured.module, inputs), "published", 0)


class Residual(nn.Module):
    """A stream of 8 that three layers add to and a head reads."""

    def __init__(self, layers: list[nn.Sequential]) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(8, 8), nn.ModuleList(layers), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_a_tight_bound_on_memory_costs_no_inverse_twice_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
    net = Residual(layers).eval()
    inputs = torch.randn(200, 8)
    coupling = couple(capture(net, inputs[:1]))
    (stream,) = [g for g in coupling.open_groups() if g.kind == "stream"]
    counted: list[str] = []
    real = saliency._inverse

    def inverse(grams: Mapping[str, torch.Tensor], name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counted.append(name)
        return real(grams, name, weight)

    monkeypatch.setattr(saliency, "_inverse", inverse)
    found = []
    for memory in (1 << 30, 4000):  # of one 8 x 8 Hessian 520 bytes fit in a quarter, of two not
        moments = LayerMoments(coupling.walk.captured.module, inputs, Compute(memory_bytes=memory))
        found.append(saliency.unit_saliency(coupling, moments, "hasa", 0))
    readers = {s.parameter for unit in stream.units for s in unit.slices if s.axis == 1}
    assert len(readers) == 4
    assert len(counted) == 2 * len(readers)  # not one for each unit as well
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class SharedKeys(nn.Module):
    """Eight heads of queries and two of keys and values, by one projection or three, fused or written out."""

    def __init__(self, packed: bool, fused: bool, turned: bool) -> None:
        super().__init__()
        self.embed, self.out, self.fc = nn.Linear(8, 16), nn.Linear(32, 16), nn.Linear(16, 3)
        self.qkv = nn.Linear(16, 48) if packed else None
        self.v, self.k, self.q = (nn.Linear(16, rows) if not packed else None for rows in (8, 8, 32))
        self.fused, self.turned = fused, turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x[:, 0])
        parts = [self.q(x), self.k(x), self.v(x)] if self.qkv is None else self.qkv(x).split([32, 8, 8], -1)
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in parts)
        if self.turned:  # a rotation like that of positions lies between
            q, k = (t * 0.8 + torch.tanh(t) * 0.6 for t in (q, k))
        if self.fused:
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3)
        else:
            k, v = (t.repeat_interleave(4, 1) for t in (k, v))
            y = (q @ k.transpose(2, 3) * 0.3).softmax(-1) @ v
        return self.fc(self.out(y.transpose(1, 2).flatten(2)).mean(1))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_scores_of_dimensions_of_shared_keys_are_of_queries_times_keys(packed: bool, fused: bool, turned: bool) -> None:
    torch.manual_seed(0)
    net, inputs = SharedKeys(packed, fused, turned), torch.randn(60, 1, 8, 8)
    coupling = coupled(net, inputs)
    moments = LayerMoments(coupling.walk.captured.module, inputs)
    (group,) = [g for g in coupling.open_groups() if g.kind == "head_dim"]
    energy = moments.energy
    q, k = (energy["qkv.weight"][:32], energy["qkv.weight"][32:40]) if packed else (energy["q.weight"], energy["k.weight"])
    expected = q.view(-1, 4).sum(0) * k.view(-1, 4).sum(0)
    found = saliency.unit_saliency(coupling, moments, "hasa", 0)[group.name]
    torch.testing.assert_close(found, expected / expected.sum())
