from __future__ import annotations

from contextlib import contextmanager, suppress

import nets
import pytest
import torch
from edge_compress.pipeline.axes.coupling import Coupling
from edge_compress.pipeline.axes.types import Unit
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.run_folder import RunFolder, Stage
from edge_compress.pipeline.score import criteria as hasa
from edge_compress.pipeline.score.connections import ConnectionScores
from edge_compress.pipeline.score.ranking import DRAWS, Order, UnitScores, ordered, rank_units, scored_by_loss, shares
from edge_compress.pipeline.score.removal import removal_curvature
from edge_compress.pipeline.types import Sensitivity
from torch import nn


def connections(net: nn.Module, unit: Unit) -> list[tuple[torch.Tensor, int, int]]:
    """The slices of convolutions and linear layers: weight, axis, index."""
    layers = {n: m.weight.detach() for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    slices = [s for s in unit.slices if s.layer in layers and s.parameter.endswith(".weight")]
    return [(layers[s.layer], s.axis, i) for s in slices for i in s.indices]


class Oracle:
    """Answers one-shot accuracy from a list, and remembers the orders it was asked about."""

    def __init__(self, *answers: tuple[float, float]) -> None:
        self.answers, self.orders = list(answers), []

    def __call__(self, order: Order) -> tuple[float, float]:
        self.orders.append(order)
        return self.answers[len(self.orders) - 1]


def rank(score: str, lambda_: float | None = None, oracle: Oracle | None = None, net=None, seed: int = 0) -> Sensitivity:
    net, coupling = net or nets.subject("OptionA")
    return rank_units(UnitScores(net, nets.units(coupling), nets.images(40, 3), score, seed), oracle or Oracle(), lambda_)


def drawn(make) -> tuple[nn.Module, Coupling]:
    coupling = nets.checked_of(nets.drawn(make)).coupling
    return coupling.walk.captured.module, coupling


def test_units_are_ordered_by_all_their_connections():
    net, coupling = nets.subject("OptionA")
    found = rank("magnitude")
    assert (found.score, found.lambda_, found.tried) == ("magnitude", 0.0, ())
    assert set(found.order) == set(nets.units(coupling))
    for group, units in nets.units(coupling).items():
        sums = []
        for unit in units:
            total = 0.0
            for weight, axis, i in connections(net, unit):
                total += float(weight.select(axis, i).abs().sum())
            sums.append(total)
        assert sorted(found.order[group]) == list(range(len(units)))
        assert [sums[i] for i in found.order[group]] == pytest.approx(sorted(sums, reverse=True))
        assert found.shares[group] == pytest.approx(sorted((value / sum(sums) for value in sums), reverse=True))


@pytest.mark.parametrize("score", ["hasa", "published", "magnitude"])
def test_a_dead_unit_comes_last(score):
    net, coupling = drawn(nets.OptionA)
    with torch.no_grad():
        net.get_submodule("layer3.1.conv1").weight[5] = 0.0
        net.get_submodule("layer3.1.conv2").weight[:, 5] = 0.0
    assert rank(score, 0.5, net=(net, coupling)).order["layer3.1.conv1"][-1] == 5


def test_curvature_decides_between_equal_weights():
    """Two channels of the same weights, one of which the network hardly listens to behind its norm."""
    net, coupling = drawn(nets.Vgg)
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
    found = UnitScores(net, nets.units(coupling), inputs, "hasa", 0).at(1.0)
    along = removal_curvature(net, nets.units(coupling), [(inputs, torch.zeros(40, dtype=torch.long))], DRAWS, seed=0)
    ranking = rank("hasa", 1.0)
    for group, units in nets.units(coupling).items():
        squares = torch.tensor(
            [
                sum(float(weight.double().select(axis, i).square().sum()) for weight, axis, i in connections(net, unit))
                for unit in units
            ],
            dtype=torch.float64,
        )
        torch.testing.assert_close(found[group], along[group] + squares * (along[group] / squares).mean())
        assert ranking.order[group] == tuple(found[group].argsort(descending=True, stable=True).tolist())


def test_lambda_is_tuned_by_the_orders_it_gives():
    grid = hasa.lambda_grid("hasa", None)
    oracle = Oracle(*[(0.5, 1.0)] * 3, (0.7, 1.0), (0.6, 1.0))
    found = rank("hasa", None, oracle)
    assert found.lambda_ == grid[3]
    assert [lam for lam, _ in found.tried] == list(grid)
    assert found.tried[3][1] == max(value for _, value in found.tried)
    assert [rank("hasa", lam).order for lam in grid] == oracle.orders
    assert found.order == oracle.orders[3] != oracle.orders[0]


def test_the_loss_decides_between_equal_accuracies():
    oracle = Oracle((0.6, 2.0), (0.6, 1.5), (0.6, 1.0), (0.6, 1.2), (0.59, 0.1))
    assert rank("hasa", None, oracle).lambda_ == hasa.lambda_grid("hasa", None)[2]


@pytest.mark.parametrize(("score", "lambda_"), [("hasa", 0.25), ("published", 3.0), ("magnitude", None), ("random", None)])
def test_nothing_is_tried_where_lambda_is_given_or_means_nothing(score, lambda_):
    oracle = Oracle()
    found = rank(score, lambda_, oracle)
    assert oracle.orders == []
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


def test_units_are_scored_by_the_loss_where_layers_that_own_their_weights_read_them():
    net, coupling = nets.subject("Vgg")
    assert scored_by_loss(net, nets.units(coupling))
    unread = {name: [Unit(tuple(s for s in units[0].slices if s.axis != 1))] for name, units in nets.units(coupling).items()}
    assert not scored_by_loss(net, unread)
    assert not scored_by_loss(nets.TiedWeights(), nets.units(coupling))


@pytest.fixture
def stage(tmp_path):
    """Opens the stage that keeps a curvature; what is logged is beside it."""
    said: list[str] = []

    @contextmanager
    def opened():
        with RunFolder(Config(("x86",), out=tmp_path / "run"), said.append) as folder:
            yield folder.stage("curvature", "1", {"score": "hasa"})

    return opened, said


def unit_scores(score: str, keeps: Stage | None = None) -> UnitScores:
    net, coupling = nets.subject("OptionA")
    return UnitScores(net, nets.units(coupling), nets.images(40, 3), score, 0, keeps=keeps)


def connection_scores(score: str, keeps: Stage | None = None) -> ConnectionScores:
    scores = ConnectionScores(nets.subject("OptionA")[0], lambda: nets.images(40, 3), score, 0)
    scores.keeps = keeps
    return scores


CURVED = [
    ("ranking.removal_curvature", lambda keeps: unit_scores("hasa", keeps).at(0.5)),
    ("ranking.gauss_newton", lambda keeps: unit_scores("published", keeps).at(3.0)),
    ("connections.gauss_newton", lambda keeps: connection_scores("hasa", keeps).at(0.5)),
]


@pytest.mark.parametrize(("curvature", "scored"), CURVED, ids=["units", "published", "connections"])
def test_a_ranking_that_was_interrupted_after_its_curvature_does_not_compute_it_again(curvature, scored, stage, monkeypatch):
    expected, (opened, said) = scored(None), stage
    with suppress(KeyboardInterrupt), opened() as kept:
        scored(kept)
        raise KeyboardInterrupt
    monkeypatch.setattr(f"edge_compress.pipeline.score.{curvature}", lambda *_, **__: pytest.fail("computed again"))
    with opened() as kept:
        found = scored(kept)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert said == []


def test_a_damaged_curvature_is_computed_again_and_that_is_said(stage):
    opened, said = stage
    with opened() as kept:
        expected = unit_scores("hasa", kept).at(0.5)
        (file,) = kept.folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 64  # a number's exponent
    file.write_bytes(data)
    with opened() as kept:
        found = unit_scores("hasa", kept).at(0.5)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "curvature.safetensors has changed" in said[0]
    assert said[0].endswith("recomputed")


def test_a_curvature_of_other_units_is_not_taken_for_theirs(stage):
    net, coupling = nets.subject("OptionA")
    fewer = {name: list(units)[1:] for name, units in nets.units(coupling).items()}
    with stage[0]() as kept:
        unit_scores("hasa", kept)
        found = UnitScores(net, fewer, nets.images(40, 3), "hasa", 0, keeps=kept).at(0.5)
    assert {name: len(value) for name, value in found.items()} == {name: len(units) for name, units in fewer.items()}


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_a_score_without_curvature_keeps_none(score, stage):
    with stage[0]() as kept:
        unit_scores(score, kept).at(0.0)
        connection_scores(score, kept).at(0.0)
        assert not list(kept.folder.iterdir())


def test_scores_that_are_negative_or_all_zero_have_no_shares():
    scores = {"signed": torch.tensor([3.0, -1.0]), "dead": torch.zeros(2), "some": torch.tensor([1.0, 3.0])}
    assert shares(scores, ordered(scores)) == {"some": (0.75, 0.25)}
