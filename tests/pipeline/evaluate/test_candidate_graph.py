from __future__ import annotations

import functools
import random

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edge_compress.calibration import ranges as activation_ranges
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.evaluate import candidate_graph as candidate
from edge_compress.pipeline.evaluate.candidate_graph import CandidateGraph
from edge_compress.pipeline.graph.coupling import Coupling, couple
from edge_compress.pipeline.graph.surgery import prune, structure_of
from edge_compress.pipeline.graph.trace import canonical
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.types import Plan
from edge_compress.targets.base import Structure
from edge_compress.targets.onnx.int8 import Recipe, quantize
from edge_compress.targets.onnx.run import predictor
from torch import fx, nn


def some_plans(coupling: Coupling, count: int, seed: int = 0) -> list[Plan]:
    """The dense network, all blocks out, and random choices."""
    rng = random.Random(seed)
    plans = [Plan(Pattern.CHANNEL, ""), Plan(Pattern.CHANNEL, "", {}, tuple(coupling.blocks))]
    for _ in range(count):
        kept = {}
        for group, units in coupling.units.items():
            kept[group] = tuple(sorted(rng.sample(range(len(units)), rng.randint(1, len(units)))))
        plans.append(Plan(Pattern.CHANNEL, "", kept, tuple(b for b in coupling.blocks if rng.random() < 0.4)))
    return plans


def redrawn(net: nn.Module, seed: int = 3) -> nn.Module:
    """Other weights and statistics: those of a candidate are never the dense network's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            if value.is_floating_point():
                value.mul_(torch.rand(value.shape, generator=generator) + 0.5).add_(0.1)
    return net


def distance(graph: CandidateGraph, small: fx.GraphModule, structure: Structure) -> float:
    inputs = nets.images()
    with torch.no_grad():
        expected = small(inputs)
    found = torch.from_numpy(graph.answers(small, structure, inputs.numpy()))
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def cuttable(name: str, small: nn.Module) -> nn.Module:
    """Linear layers on maps are out of every plan's reach: they keep their values, the rest of the candidate is drawn anew."""
    if name == "Normalised":
        fixed = {k: v.clone() for k, v in small.state_dict().items() if k.split(".")[0] in ("up", "down", "norm")}
        redrawn(small)
        small.load_state_dict(fixed, strict=False)
        return small
    return redrawn(small)


NETS = ["OptionA", "PreActivation", "Mobile", "Gated", "Concatenated", "Vgg", "Bare", "Grouped", "Normalised"]


@functools.cache
def exported(name: str) -> CandidateGraph:
    return CandidateGraph(nets.subject(name)[0], nets.SHAPE)


@pytest.mark.parametrize("name", NETS)
def test_a_candidate_answers_what_torch_answers(name):
    (net, coupling), graph = nets.subject(name), exported(name)
    for plan in some_plans(coupling, 3):
        small = cuttable(name, prune(net, coupling, plan))
        assert distance(graph, small, structure_of(net, coupling, plan)) < 1e-5, plan


# of the answers' spread; processors without VNNI may have 7-bit weights, whose steps are twice as wide
NEAR = 0.1 if len({recipe.weight_bits for recipe in candidate.RECIPES}) == 1 else 0.2


@functools.cache
def quantized(name: str) -> CandidateGraph:
    return CandidateGraph(nets.subject(name)[0], nets.SHAPE).in_int8(nets.images(32).numpy())


@pytest.mark.parametrize("name", NETS)
def test_in_int8_a_candidate_answers_nearly_what_it_answers_in_float(name):
    """The dense graph, quantized once, cut and filled; ranges are the dense network's, so its weights are kept here."""
    (net, coupling), graph, float_graph = nets.subject(name), quantized(name), exported(name)
    images = nets.images(32).numpy()
    for plan in some_plans(coupling, 3)[:1] + [Plan(Pattern.CHANNEL, "", {}, (b,)) for b in list(coupling.blocks)[:2]]:
        small, structure = prune(net, coupling, plan), structure_of(net, coupling, plan)
        expected, found = float_graph.answers(small, structure, images), graph.answers(small, structure, images)
        error = np.sqrt(((found - expected) ** 2).mean() / expected.var())
        assert 1e-7 < error < NEAR, plan


@pytest.mark.parametrize("name", NETS)
def test_a_cut_int8_graph_is_the_candidate_quantized_from_scratch(name):
    """What `fill` writes into the cut graph is what the quantizer makes of the candidate itself, given the same ranges."""
    net, coupling = nets.subject(name)
    graph, float_graph, images = quantized(name), exported(name), nets.images(32).numpy()
    ranges = activation_ranges.ranges(
        activation_ranges.collect(float_graph._model(net, Structure({})), [images]), graph.recipe.ranges
    )
    for plan in some_plans(coupling, 3):
        small, structure = prune(net, coupling, plan), structure_of(net, coupling, plan)
        expected = predictor(quantize(float_graph._model(small, structure), ranges, graph.recipe).SerializeToString())(images)
        found = graph.answers(small, structure, images)
        assert np.sqrt(((found - expected) ** 2).mean() / expected.var()) < NEAR, plan


class Even(nn.Module):
    """Values an exporter finds nothing in: biases of zero, and tensors that are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.hidden, self.norm, self.fc = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        x = self.b(F.relu(self.bn1(x))) * 1.0
        x = self.c(F.relu(self.bn2(x)))
        return self.fc(F.relu(self.norm(self.hidden(F.relu(x).mean((2, 3))))))


def even() -> nn.Module:
    net = nets.drawn(Even)
    fresh = Even()
    with torch.no_grad():
        for name in ("bn1", "bn2", "norm"):
            net.get_submodule(name).load_state_dict(fresh.get_submodule(name).state_dict())
        for layer in (net.a, net.b, net.c, net.fc):
            layer.bias.zero_()
        net.c.weight.copy_(net.b.weight)
    return net


def test_values_that_are_zero_or_equal_in_the_dense_network_have_their_place_too():
    """The exporter drops a bias of zeros and makes one of two equal tensors: the candidate's would be lost without a word."""
    net = canonical(even(), nets.SHAPE)
    coupling = couple(net)
    graph = CandidateGraph(net, nets.SHAPE)
    for plan in some_plans(coupling, 3):
        small = redrawn(prune(net, coupling, plan))
        assert distance(graph, small, structure_of(net, coupling, plan)) < 1e-5
    dense = prune(net, coupling, Plan(Pattern.CHANNEL, ""))
    assert distance(graph, dense, structure_of(net, coupling, Plan(Pattern.CHANNEL, ""))) < 1e-5  # zeros are given too


@pytest.fixture(scope="module")
def dense_graph() -> tuple[fx.GraphModule, Coupling, CandidateGraph]:
    return *nets.subject("Bare"), exported("Bare")


def test_images_beyond_one_batch_come_in_order(dense_graph, monkeypatch):
    net, coupling, graph = dense_graph
    structure = structure_of(net, coupling, Plan(Pattern.CHANNEL, ""))
    inputs = nets.images(7).numpy()
    whole = graph.answers(net, structure, inputs)
    monkeypatch.setattr(candidate, "BATCH", 3)
    parts = graph.answers(net, structure, inputs)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    assert whole.shape == (7, nets.CLASSES)
    assert np.abs(np.diff(whole, axis=0)).min() > 0


def test_one_candidate_leaves_nothing_to_the_next(dense_graph):
    net, coupling, graph = dense_graph
    dense, small_plan = Plan(Pattern.CHANNEL, ""), some_plans(coupling, 1)[-1]
    before = graph.answers(net, structure_of(net, coupling, dense), nets.images().numpy())
    small = redrawn(prune(net, coupling, small_plan))
    graph.answers(small, structure_of(net, coupling, small_plan), nets.images().numpy())
    assert np.array_equal(graph.answers(net, structure_of(net, coupling, dense), nets.images().numpy()), before)


def test_a_value_without_a_place_is_an_error_that_names_it(dense_graph):
    net, coupling, graph = dense_graph
    structure = structure_of(net, coupling, Plan(Pattern.CHANNEL, ""))
    inputs = nets.images().numpy()
    extra = prune(net, coupling, Plan(Pattern.CHANNEL, ""))
    extra.get_submodule("c").bias = nn.Parameter(torch.ones(8))  # the dense layer has none
    with pytest.raises(BuildError, match=r"c\.bias of the candidate has no place"):
        graph.answers(extra, structure, inputs)
    less = prune(net, coupling, Plan(Pattern.CHANNEL, ""))
    less.get_submodule("b").bias = None
    with pytest.raises(BuildError, match=r"the candidate has no b\.bias"):
        graph.answers(less, structure, inputs)
    narrow = prune(net, coupling, Plan(Pattern.CHANNEL, "", {"a": (0, 1)}))
    with pytest.raises(BuildError, match=r"a\.weight of the candidate: found shape \(2, 3, 3, 3\)"):
        graph.answers(narrow, structure, inputs)


def test_a_layer_no_plan_reaches_must_be_as_it_was():
    (net, coupling), graph = nets.subject("Normalised"), exported("Normalised")
    plan = Plan(Pattern.CHANNEL, "", {"a": (0, 1, 5)})
    changed = prune(net, coupling, plan)
    with torch.no_grad():
        changed.get_submodule("up").weight[0, 0] += 1.0
    with pytest.raises(BuildError, match=r"up\.weight"):
        graph.answers(changed, structure_of(net, coupling, plan), nets.images().numpy())


class FunctionalNorm(nn.Module):
    """A convolution whose BatchNorm is a function: the exporter makes one layer of both, which no module's values are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 7, 3, padding=1), nn.Linear(7, nets.CLASSES)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(self.a(x), self.mean, self.var)
        return self.fc(F.relu(self.b(F.relu(x))).mean((2, 3)))


def test_a_graph_that_answers_otherwise_than_the_network_is_refused_before_the_search():
    net = nets.drawn(FunctionalNorm)
    with torch.no_grad():
        net.mean.fill_(0.5)
        net.var.fill_(4.0)
    with pytest.raises(BuildError, match=r"does not answer as the network does: found a difference of .*, first at b,"):
        CandidateGraph(canonical(net, nets.SHAPE), nets.SHAPE)


def test_the_recipe_of_candidates_is_the_one_with_the_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a value far out in one image, ranges that hold it leave few steps for the others."""
    net, images = nets.subject("Vgg")[0], nets.images(64)
    images[0, 0, :4, :4] = 60.0
    graph, ways = CandidateGraph(net, nets.SHAPE), candidate.RECIPES
    with torch.no_grad():
        exact = net(images)

    def error(*kinds: Recipe) -> float:
        monkeypatch.setattr(candidate, "RECIPES", kinds)
        found = graph.in_int8(images.numpy()).answers(net, Structure({}), images.numpy())
        return float((torch.from_numpy(found) - exact).square().mean())

    each = {way: error(way) for way in ways}
    assert len(set(each.values())) > 1
    assert error(*ways) == min(each.values())
