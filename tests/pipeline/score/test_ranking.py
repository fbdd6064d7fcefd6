from __future__ import annotations

import nets
import pytest
import torch
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.evaluate import layer_hessians
from edge_compress.pipeline.graph.coupling import couple
from edge_compress.pipeline.graph.knobs import knobs_for
from edge_compress.pipeline.graph.trace import canonical, layer_nodes
from edge_compress.pipeline.graph.units import Unit
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.reconstruct.reconstruction import columns
from edge_compress.pipeline.score import criteria as hasa
from edge_compress.pipeline.score import ranking as sensitivity
from edge_compress.pipeline.score.ranking import rank_units
from edge_compress.pipeline.score.removal import removal_curvature
from edge_compress.pipeline.types import Plan, Sensitivity
from edge_compress.targets.base import Limits
from torch import fx


def connections(net: fx.GraphModule, unit: Unit) -> list[tuple[torch.Tensor, int, int]]:
    """The slices of convolutions and linear layers: weight, axis, index."""
    layers = {str(n.target): layer.weight.detach() for n, layer in layer_nodes(net)}
    slices = [s for s in unit.slices if s.layer in layers and s.parameter.endswith(".weight")]
    return [(layers[s.layer], s.axis, i) for s in slices for i in s.indices]


LIMITS = Limits(1, (Precision.FP32,), (Pattern.CHANNEL,))


class Oracle:
    """Answers one-shot accuracy from a list, and remembers the plans it was asked about."""

    def __init__(self, *answers: tuple[float, float]) -> None:
        self.answers, self.plans = list(answers), []

    def one_shot(self, plan: Plan) -> tuple[float, float]:
        self.plans.append(plan)
        return self.answers[len(self.plans) - 1]


def rank(score: str, lambda_: float | None = None, oracle: Oracle | None = None, net=None, seed: int = 0) -> Sensitivity:
    net, coupling = net or nets.subject("OptionA")
    inputs = nets.images(40, 3)
    return rank_units(net, coupling, knobs_for(coupling, LIMITS), oracle or Oracle(), inputs, score, lambda_, seed)


@pytest.mark.parametrize("name", ["OptionA", "Mobile", "Vgg", "Grouped"])
def test_moments_are_the_mean_products_of_what_each_layer_reads(name):
    net, _ = nets.subject(name)
    inputs = nets.images(30, 4)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        net.get_submodule(str(n.target)).register_forward_hook(lambda m, i, out, name=str(n.target): seen.__setitem__(name, i[0]))
        for n, _ in layer_nodes(net)
    ]
    with torch.no_grad():
        net(inputs)
    for hook in hooks:
        hook.remove()
    found = nets.hessians(net, inputs)
    assert set(found) == {n for n in seen if getattr(net.get_submodule(n), "groups", 1) == 1}
    for layer, gram in found.items():
        x = columns(seen[layer], net.get_submodule(layer)).double()
        torch.testing.assert_close(gram.double(), x @ x.T / x.shape[1], rtol=1e-4, atol=1e-5)


def test_moments_take_a_bounded_number_of_images(monkeypatch):
    net, _ = nets.subject("Vgg")
    few = nets.hessians(net, nets.images(12, 4))
    monkeypatch.setattr(layer_hessians, "HESSIAN_IMAGES", 12)
    many = nets.hessians(net, torch.cat([nets.images(12, 4), nets.images(50, 5)]))
    assert all(torch.equal(gram, many[layer]) for layer, gram in few.items())


def test_units_are_ordered_by_all_their_connections():
    net, coupling = nets.subject("OptionA")
    found = rank("magnitude")
    assert (found.score, found.lambda_, found.tried) == ("magnitude", 0.0, ())
    assert set(found.order) == set(coupling.units)
    for group, units in coupling.units.items():
        sums = []
        for unit in units:
            total = 0.0
            for weight, axis, i in connections(net, unit):
                total += float(weight.select(axis, i).abs().sum())
            sums.append(total)
        assert sorted(found.order[group]) == list(range(len(units)))
        assert [sums[i] for i in found.order[group]] == pytest.approx(sorted(sums, reverse=True))


@pytest.mark.parametrize("score", ["hasa", "published", "magnitude"])
def test_a_dead_unit_comes_last(score):
    net = canonical(nets.drawn(nets.OptionA), nets.SHAPE)
    coupling = couple(net)
    with torch.no_grad():
        net.get_submodule("layer3.1.conv1").weight[5] = 0.0
        net.get_submodule("layer3.1.conv2").weight[:, 5] = 0.0
    assert rank(score, 0.5, net=(net, coupling)).order["layer3.1.conv1"][-1] == 5


def test_curvature_decides_between_equal_weights():
    """Two channels of the same weights, one of which the network hardly listens to behind its norm."""
    net = canonical(nets.drawn(nets.Vgg), nets.SHAPE)
    coupling = couple(net)
    with torch.no_grad():
        first, norm, second = (net.get_submodule(f"features.{i}") for i in (0, 1, 4))
        first.weight.copy_(first.weight[:1].expand_as(first.weight))
        second.weight.copy_(second.weight[:, :1].expand_as(second.weight))
        for values in (norm.running_mean, norm.running_var, norm.bias):
            values.copy_(values[:1].expand_as(values))
        norm.weight.fill_(0.01)
        norm.weight[2] = 3.0
        norm.bias.fill_(0.3)
    assert rank("hasa", 1.0, net=(net, coupling)).order["features.0"][0] == 2
    assert rank("magnitude", net=(net, coupling)).order["features.0"] == (0, 1, 2, 3, 4, 5)  # of equals the first


def test_hasa_takes_the_curvature_along_whole_units_and_not_the_sum_over_connections():
    net, coupling = nets.subject("OptionA")
    inputs = nets.images(40, 3)
    found = sensitivity.UnitScores(net, coupling, inputs, "hasa", 0).at(1.0)
    along = removal_curvature(net, coupling.units, [(inputs, torch.zeros(40, dtype=torch.long))], sensitivity.DRAWS, seed=0)
    ranking = rank("hasa", 1.0)
    for group, units in coupling.units.items():
        squares = torch.tensor(
            [
                sum(float(weight.double().select(axis, i).square().sum()) for weight, axis, i in connections(net, unit))
                for unit in units
            ],
            dtype=torch.float64,
        )
        torch.testing.assert_close(found[group], along[group] + squares * (along[group] / squares).mean())
        assert ranking.order[group] == tuple(found[group].argsort(descending=True, stable=True).tolist())


def test_lambda_is_tuned_on_half_of_every_inner_group():
    _, coupling = nets.subject("OptionA")
    grid = hasa.lambda_grid("hasa", None)
    oracle = Oracle(*[(0.5, 1.0)] * 3, (0.7, 1.0), (0.6, 1.0))
    found = rank("hasa", None, oracle)
    assert found.lambda_ == grid[3]
    assert [lam for lam, _ in found.tried] == list(grid)
    assert found.tried[3][1] == max(value for _, value in found.tried)
    assert found.order == rank("hasa", grid[3]).order
    groups = {g.name: g for g in coupling.groups}
    for plan in oracle.plans:
        assert not plan.removed_blocks
        assert {g for g in groups if groups[g].kind == "inner"} == set(plan.kept)
        assert all(len(kept) == groups[g].size // 2 for g, kept in plan.kept.items())


def test_the_loss_decides_between_equal_accuracies():
    oracle = Oracle((0.6, 2.0), (0.6, 1.5), (0.6, 1.0), (0.6, 1.2), (0.59, 0.1))
    assert rank("hasa", None, oracle).lambda_ == hasa.lambda_grid("hasa", None)[2]


@pytest.mark.parametrize(("score", "lambda_"), [("hasa", 0.25), ("published", 3.0), ("magnitude", None), ("random", None)])
def test_nothing_is_tried_where_lambda_is_given_or_means_nothing(score, lambda_):
    oracle = Oracle()
    found = rank(score, lambda_, oracle)
    assert oracle.plans == []
    assert (found.lambda_, found.tried) == (lambda_ or 0.0, ())


def test_the_same_seed_gives_the_same_order_and_another_seed_other_labels():
    assert rank("hasa", 0.5) == rank("hasa", 0.5)
    assert rank("random", seed=1) == rank("random", seed=1)
    assert rank("random", seed=1).order != rank("random", seed=2).order


@pytest.mark.parametrize(("score", "lambda_"), [("gradient", None), ("hasa", 1.5), ("published", -1.0)])
def test_an_unknown_score_or_a_lambda_it_does_not_take_is_wrong_input(score, lambda_):
    with pytest.raises(InputError) as caught:
        rank(score, lambda_)
    assert score in str(caught.value)
    assert "\n" not in str(caught.value)
