from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.devices.measure.timing import Ratio
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.evaluate.candidate_graph import CandidateGraph
from edge_compress.pipeline.evaluate.channel_evaluator import StitchedEvaluator
from edge_compress.pipeline.evaluate.evaluation_context import Bench
from edge_compress.pipeline.evaluate.reward_samples import RewardSamples
from edge_compress.pipeline.evaluate.table_evaluator import table_error
from edge_compress.pipeline.graph.coupling import Coupling, couple
from edge_compress.pipeline.graph.knobs import SHARES, knobs_for, plan_for
from edge_compress.pipeline.graph.surgery import prune, structure_of
from edge_compress.pipeline.graph.trace import canonical
from edge_compress.pipeline.graph.units import Group
from edge_compress.pipeline.network.cost import cost_of
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.reconstruct.least_squares import stitched_weight
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import Batch
from edge_compress.pipeline.types import Candidate, Kind, Knob, ModelCost, Plan
from edge_compress.targets.base import Limits, Structure
from edge_compress.targets.onnx.prober import OnnxProber
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def limits(multiple: int) -> Limits:
    return Limits(multiple, (Precision.FP32,), (Pattern.CHANNEL,))


def order_of(coupling: Coupling) -> dict[str, tuple[int, ...]]:
    """A ranking that is not the units' own order."""
    return {name: tuple(sorted(range(len(units)), key=lambda i: (i * 7 + 3) % 11)) for name, units in coupling.units.items()}


# ------------------------------------------------------------------------------------------------ knobs and plans


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6), multiple=st.sampled_from([1, 2, 4, 8, 16]))
@settings(deadline=None)
def test_knobs_keep_to_the_targets_multiples(sizes, multiple):
    groups = tuple(Group(f"g{i}", "inner", size, (f"g{i}",), ("x",)) for i, size in enumerate(sizes))
    knobs = {k.name: k for k in knobs_for(Coupling(groups, {}, {}), limits(multiple))}
    for group in groups:
        knob = knobs.get(group.name)
        if knob is None:
            assert group.size <= multiple  # there is nothing smaller that the kernels like
            continue
        assert knob.kept[0] == knob.size == group.size
        assert all(count % multiple == 0 and count > 0 for count in knob.kept[1:])
        assert list(knob.kept) == sorted(set(knob.kept), reverse=True)
        assert 1 < len(knob.kept) <= len(SHARES)
        for share in SHARES:  # nothing asked for is further away than rounding to a multiple
            assert min(abs(count - group.size * share) for count in knob.kept) <= max(multiple / 2, multiple - group.size * share)


def test_a_block_is_there_or_not():
    _, coupling = nets.subject("OptionA")
    knobs = {k.name: k for k in knobs_for(coupling, limits(4))}
    assert knobs["block:layer2.1.conv2"] == Knob("block:layer2.1.conv2", "block", 1, (1, 0))
    assert knobs["layer3.0.conv2"] == Knob("layer3.0.conv2", "coupled", 12, (12, 8, 4))
    assert "conv1" not in knobs  # four channels in steps of four: no choice, no knob
    assert [k.name for k in knobs_for(coupling, limits(1))] == [g.name for g in coupling.groups]


def test_a_plan_keeps_the_highest_scored_units():
    knobs = (Knob("a", "inner", 4, (4, 2, 1)), Knob("b", "coupled", 3, (3, 1)), Knob("block:c", "block", 1, (1, 0)))
    order = {"a": (2, 0, 3, 1), "b": (1, 2, 0)}
    plan = plan_for(knobs, (1, 0, 1), order, "hasa")
    assert plan == Plan(Pattern.CHANNEL, "hasa", {"a": (0, 2)}, ("block:c",), {"a": 0.5, "b": 0.0, "block:c": 1.0})
    assert plan_for(knobs, (0, 0, 0), order, "hasa").kept == {}
    assert plan_for(knobs, (2, 1, 0), order, "hasa").kept == {"a": (2,), "b": (1,)}
    with pytest.raises(ValueError, match="zip"):
        plan_for(knobs, (0, 0), order, "hasa")


@pytest.mark.parametrize("name", nets.NETS)
@given(data=st.data())
@settings(deadline=None, max_examples=8)
def test_the_structure_says_what_the_network_will_be(name, data):
    net, coupling = nets.subject(name)
    knobs = knobs_for(coupling, limits(data.draw(st.sampled_from([1, 2]))))
    levels = tuple(data.draw(st.integers(0, len(k.kept) - 1)) for k in knobs)
    plan = plan_for(knobs, levels, order_of(coupling), "")
    structure, small = structure_of(net, coupling, plan), prune(net, coupling, plan)
    shapes, dense = (
        {
            n: (m.in_features, m.out_features) if isinstance(m, nn.Linear) else (m.in_channels, m.out_channels)
            for n, m in network.named_modules()
            if isinstance(m, nn.Conv2d | nn.Linear)
        }
        for network in (small, net)
    )
    assert dict(structure.widths) == {n: shapes[n] for n in structure.widths}
    assert {n: s for n, s in shapes.items() if n not in structure.widths and s != dense[n]} == {}
    gone = {k.name for k, level in zip(knobs, levels, strict=True) if k.kind == "block" and level}
    assert set(structure.removed) == {coupling.blocks[name].tail for name in gone}
    for knob, level in zip(knobs, levels, strict=True):
        if knob.kind != "block" and not any(knob.name in coupling.blocks[b].layers for b in gone):
            producer = next(g for g in coupling.groups if g.name == knob.name).producers[0]
            assert knob.kept[level] <= shapes[producer][1]


# ------------------------------------------------------------------------------------------------ the evaluator


class Prober:
    """Models that are their own description."""

    def baseline(self) -> bytes:
        return b"dense"

    def candidate(self, structure: Structure) -> bytes:
        widths = {name: list(width) for name, width in structure.widths.items()}
        return json.dumps({"widths": widths, "removed": len(structure.removed)}).encode()

    def macs(self, structure: Structure) -> int:
        return sum(i * o for i, o in structure.widths.values())


class Meter:
    """Every layer takes a base time and a time for its width."""

    width = 1

    def __init__(self) -> None:
        self.asked = 0

    def ratio(self, model: bytes) -> Ratio:
        self.asked += 1
        return Ratio(sum(0.02 + i * o / 4000 for i, o in json.loads(model)["widths"].values()))

    def ratios(self, models: list[bytes]) -> list[Ratio]:
        return [self.ratio(model) for model in models]


NAME = "OptionA"
Make = Callable[..., tuple[StitchedEvaluator, Meter]]


@pytest.fixture(scope="module")
def images() -> RewardSamples:
    labels = torch.randint(0, nets.CLASSES, (40,), generator=torch.Generator().manual_seed(0))
    return RewardSamples(Batch(nets.images(40, 7), labels), nets.images(32, 8), Classification(), nets.subject(NAME)[0])


@pytest.fixture(scope="module")
def grams() -> dict[str, torch.Tensor]:
    return nets.hessians(nets.subject(NAME)[0], nets.images(64, 9))


@pytest.fixture(scope="module")
def exported() -> StitchedEvaluator:
    """Holds the graph that all evaluators of this file share: exporting takes a second."""
    net, coupling = nets.subject(NAME)
    empty = RewardSamples(Batch(nets.images(1), torch.zeros(1)), nets.images(1), Classification(), net)
    bench = Bench(empty.batch.inputs, {}, empty, Prober(), Meter(), None, Path("none"))
    return StitchedEvaluator(net, coupling, (), {}, CandidateGraph(net, nets.SHAPE), bench)


@pytest.fixture
def make(exported, images, grams, tmp_path, monkeypatch) -> Make:
    net, coupling = nets.subject(NAME)
    monkeypatch.setattr("edge_compress.pipeline.evaluate.channel_evaluator.CandidateGraph", lambda *_: exported._graph)
    knobs = knobs_for(coupling, limits(2))

    def build(memo: str = "memo.jsonl", cache: str = "cache", prober: object = None) -> tuple[StitchedEvaluator, Meter]:
        meter = Meter()
        stored = LatencyCache({"device": "test"}, tmp_path / cache)
        bench = Bench(images.batch.inputs, grams, images, prober or Prober(), meter, stored, tmp_path / memo)
        return StitchedEvaluator(net, coupling, knobs, order_of(coupling), CandidateGraph(net, nets.SHAPE), bench), meter

    return build


class TwoBoards(Meter):
    """Says what was measured side by side."""

    width = 2

    def __init__(self) -> None:
        super().__init__()
        self.together: list[int] = []

    def ratios(self, models: list[bytes]) -> list[Ratio]:
        self.together.append(len(models))
        return super().ratios(models)


def test_candidates_a_search_expects_are_measured_side_by_side_on_several_boards(make):
    evaluator, one_board = make()
    wanted = [some_levels(evaluator, seed) for seed in range(4)]
    evaluator.expect(wanted)
    assert (evaluator.width, one_board.asked) == (1, 0)  # nothing is gained by hurry

    boards = evaluator.bench.meter = TwoBoards()
    evaluator.evaluate(wanted[0])
    evaluator.expect(wanted)
    assert evaluator.width == 2
    assert boards.together == [3]  # the first is known
    found = [evaluator.evaluate(levels).latency_ratio for levels in wanted]
    assert boards.asked == 4  # nothing was asked again
    assert found == [make("other.jsonl", "other")[0].evaluate(levels).latency_ratio for levels in wanted]


def test_a_guess_that_cannot_be_measured_does_not_end_the_search(make):
    evaluator, _ = make()
    wanted = [some_levels(evaluator, seed) for seed in range(3)]

    class Refusing(TwoBoards):
        def ratios(self, models: list[bytes]) -> list[Ratio]:
            raise BuildError("a candidate", found="refused")

    evaluator.bench.meter = Refusing()
    evaluator.expect(wanted)
    assert evaluator.evaluate(wanted[0]).latency_ratio > 0


def some_levels(evaluator: StitchedEvaluator, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(int(torch.randint(0, len(k.kept), (1,), generator=generator)) for k in evaluator.knobs)


def test_a_candidate_is_judged_by_its_own_answers(make, images):
    evaluator, _ = make()
    net, coupling = nets.subject(NAME)
    for seed in range(3):
        levels = some_levels(evaluator, seed)
        plan = plan_for(evaluator.knobs, levels, evaluator.order, "")
        small = evaluator.network(plan)
        with torch.no_grad():
            outputs = small(images.batch.inputs)
        found = evaluator.evaluate(levels)
        assert found.levels == levels
        assert found.accuracy == pytest.approx(float((outputs.argmax(1) == images.batch.targets).float().mean()))
        assert found.loss == pytest.approx(float(F.cross_entropy(outputs, images.batch.targets)), rel=1e-4)
        structure = structure_of(net, coupling, plan)
        assert found.latency_ratio == Meter().ratio(Prober().candidate(structure)).value
        assert found.latency_kind is Kind.MEASURED
        assert found.cost.params == sum(p.numel() for p in small.parameters())
        assert found.cost.macs == Prober().macs(structure)
        assert found.seconds > 0
        assert evaluator.one_shot(plan) == (found.accuracy, found.loss)


def test_the_real_prober_counts_what_torch_counts():
    for name in ("Mobile", "Concatenated", "Grouped"):
        net, coupling = nets.subject(name)
        prober = OnnxProber(net, image_signature(nets.SHAPE), Precision.FP32)
        knobs = knobs_for(coupling, limits(1))
        plan = plan_for(knobs, tuple(len(k.kept) - 1 for k in knobs), order_of(coupling), "")
        small = prune(net, coupling, plan)
        assert prober.macs(structure_of(net, coupling, plan)) == cost_of(small, torch.zeros(1, *nets.SHAPE)).macs


def test_stitched_weights_are_those_of_the_kept_inputs_and_statistics_are_taken_again(make, images, grams):
    evaluator, _ = make()
    net, _ = nets.subject(NAME)
    plan = Plan(Pattern.CHANNEL, "", {"layer2.0.conv1": (1, 2, 6)})
    small = evaluator.network(plan)
    expected = stitched_weight(net.get_submodule("layer2.0.conv2"), grams["layer2.0.conv2"], torch.tensor([1, 2, 6]))
    assert torch.equal(small.get_submodule("layer2.0.conv2").weight, expected)
    assert torch.equal(small.get_submodule("layer3.0.conv1").weight, net.get_submodule("layer3.0.conv1").weight)
    means = [[n.get_submodule(name).running_mean for n in (small, net)] for name in ("bn1", "layer2.0.bn2")]
    torch.testing.assert_close(*means[0], rtol=1e-4, atol=1e-5)  # nothing is removed before it: as in the dense network
    assert not torch.allclose(*means[1], rtol=1e-2, atol=1e-3)  # three inputs are left to the layer before it
    assert not any(m.training for m in small.modules())
    assert len(evaluator.solved) == 1
    evaluator.network(plan)
    assert len(evaluator.solved) == 1  # solved once for each set of kept inputs


def test_evaluations_are_replayed_without_computing(make, tmp_path):
    evaluator, meter = make()
    asked = [some_levels(evaluator, seed) for seed in range(3)]
    first = [evaluator.evaluate(levels) for levels in asked]
    assert meter.asked == 3
    lines = (tmp_path / "memo.jsonl").read_bytes()
    assert lines.count(b"\n") == 3
    again, idle = make(cache="another", prober=object())  # an evaluation would need a prober
    assert [again.evaluate(levels) for levels in asked] == first
    assert idle.asked == 0
    assert (tmp_path / "memo.jsonl").read_bytes() == lines


@pytest.mark.parametrize("leaving", [b'{"levels": [0, 1', b"[]\n", b'{"levels": [1]}\n{"levels"', b"\xff\xfe\n"])
def test_a_line_a_killed_run_left_unfinished_is_cut_off(make, tmp_path, leaving):
    evaluator, _ = make()
    asked = [some_levels(evaluator, seed) for seed in range(2)]
    kept = evaluator.evaluate(asked[0])
    memo = tmp_path / "memo.jsonl"
    whole = memo.read_bytes()
    memo.write_bytes(whole + leaving)
    again, _ = make()
    assert memo.read_bytes() == whole
    assert again.evaluate(asked[0]) == kept
    new = again.evaluate(asked[1])
    last, _ = make()
    assert [last.evaluate(levels) for levels in asked] == [kept, new]
    assert memo.read_bytes().count(b"\n") == 2


def test_a_structure_is_measured_once_on_a_device(make):
    evaluator, meter = make()
    levels = some_levels(evaluator, 1)
    before = evaluator.evaluate(levels)
    other, other_meter = make(memo="other.jsonl")
    after = other.evaluate(levels)
    assert (meter.asked, other_meter.asked, other.bench.reused, evaluator.bench.reused) == (1, 0, 1, 0)
    assert replace(after, seconds=0.0) == replace(before, seconds=0.0)


def test_accuracy_alone_asks_the_device_for_nothing(make, tmp_path):
    evaluator, meter = make()
    accuracy, loss = evaluator.one_shot(Plan(Pattern.CHANNEL, "", {"conv1": (0, 1)}))
    assert 0 <= accuracy <= 1
    assert loss > 0
    assert meter.asked == 0
    assert not (tmp_path / "memo.jsonl").exists()


def single(evaluator: StitchedEvaluator, knob: int, level: int) -> tuple[int, ...]:
    return tuple(level if i == knob else 0 for i in range(len(evaluator.knobs)))


def test_the_table_is_measured_once_and_estimates_are_free_then(make):
    evaluator, meter = make()
    entries = 1 + sum(len(k.kept) - 1 for k in evaluator.knobs)
    assert evaluator.fill_table() == entries
    asked = meter.asked
    assert 0 < asked <= entries
    for seed in range(20):
        evaluator.latency_estimate(some_levels(evaluator, seed))
    assert evaluator.fill_table() == entries
    assert meter.asked == asked


class NoisyMeter(Meter):
    """Off by up to a tenth, by what has nothing to do with the time: the layers' names."""

    def ratio(self, model: bytes) -> Ratio:
        noise = random.Random(model).uniform(0.9, 1.1)
        return Ratio(super().ratio(model).value * noise)


def test_knobs_that_change_the_network_alike_share_one_entry(grams, images, tmp_path, monkeypatch):
    """Of four equal blocks none looks better than the others because its measurement was lucky."""
    monkeypatch.setattr("edge_compress.pipeline.evaluate.channel_evaluator.CandidateGraph", lambda *_: None)
    deep = nets.OptionA()
    deep.layer2.extend(nets.PaddedBlock(8, 8, 1) for _ in range(2))
    net = canonical(nets.drawn(lambda: deep), nets.SHAPE)
    coupling = couple(net)
    knobs = knobs_for(coupling, limits(2))

    def table(meter: Meter, name: str) -> dict[tuple[int, int], float]:
        bench = Bench(
            images.batch.inputs, grams, images, Prober(), meter, LatencyCache({"device": name}, tmp_path), tmp_path / name
        )
        evaluator = StitchedEvaluator(net, coupling, knobs, order_of(coupling), CandidateGraph(net, nets.SHAPE), bench)
        evaluator.fill_table()
        entries = [(i, level) for i, k in enumerate(knobs) for level in range(1, len(k.kept))]
        return {entry: evaluator.latency_estimate(single(evaluator, *entry)) for entry in entries}

    noisy = table(NoisyMeter(), "noisy")
    blocks = [i for i, k in enumerate(knobs) if k.name.startswith("block:layer2.") and not k.name.endswith("2.0.conv2")]
    assert len(blocks) == 3
    assert len({noisy[i, 1] for i in blocks}) == 1
    stream = next(i for i, k in enumerate(knobs) if k.kind == "coupled")
    assert noisy[stream, 1] not in {noisy[i, 1] for i in blocks}
    for (i, level), ratio in table(Meter(), "exact").items():  # what is pooled is equal but for the noise
        plan = plan_for(knobs, tuple(level if k == i else 0 for k in range(len(knobs))), order_of(coupling), "")
        assert ratio == pytest.approx(Meter().ratio(Prober().candidate(structure_of(net, coupling, plan))).value)


def test_an_estimate_of_one_knob_is_its_entry_and_of_several_what_their_layers_keep(make):
    evaluator, _ = make()
    dense = evaluator.latency_estimate((0,) * len(evaluator.knobs))
    measured = {}
    for i, knob in enumerate(evaluator.knobs):
        for level in range(len(knob.kept)):
            plan = plan_for(evaluator.knobs, single(evaluator, i, level), evaluator.order, "")
            measured[i, level] = evaluator.bench.latency_ratio(structure_of(*nets.subject(NAME), plan))
            assert evaluator.latency_estimate(single(evaluator, i, level)) == pytest.approx(measured[i, level])
    assert dense == measured[0, 0]
    at = {k.name: i for i, k in enumerate(evaluator.knobs)}
    one, other = at["layer2.0.conv1"], at["layer3.1.conv1"]
    apart = tuple(1 if i in (one, other) else 0 for i in range(len(at)))
    assert evaluator.latency_estimate(apart) == pytest.approx(measured[one, 1] + measured[other, 1] - dense, rel=0.02)
    deepest = tuple(0 if k.kind == "block" else len(k.kept) - 1 for k in evaluator.knobs)  # layers lose inputs and outputs
    plan = plan_for(evaluator.knobs, deepest, evaluator.order, "")
    really = evaluator.bench.latency_ratio(structure_of(*nets.subject(NAME), plan))
    added = dense - sum(dense - measured[i, level] for i, level in enumerate(deepest))
    assert added < 0.8 * really
    assert abs(evaluator.latency_estimate(deepest) - really) < 0.5 * abs(added - really)


def test_knobs_inside_a_removed_block_change_nothing(make):
    evaluator, _ = make()
    at = {k.name: i for i, k in enumerate(evaluator.knobs)}
    without = single(evaluator, at["block:layer3.1.conv2"], 1)
    inside = tuple(2 if i == at["layer3.1.conv1"] else level for i, level in enumerate(without))
    stream = tuple(1 if i == at["layer3.0.conv2"] else level for i, level in enumerate(without))
    assert evaluator.latency_estimate(inside) == evaluator.latency_estimate(without)
    assert evaluator.latency_estimate(stream) < evaluator.latency_estimate(without)  # the stream is there all the same


def test_an_estimate_stays_positive_and_falls_with_every_level(make):
    evaluator, _ = make()
    dense = evaluator.latency_estimate((0,) * len(evaluator.knobs))
    lowest = tuple(len(k.kept) - 1 for k in evaluator.knobs)
    assert 0.05 * dense <= evaluator.latency_estimate(lowest) < dense
    for i, knob in enumerate(evaluator.knobs):
        steps = [evaluator.latency_estimate(single(evaluator, i, level)) for level in range(len(knob.kept))]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] > steps[-1]


def test_the_tables_error_is_taken_over_measured_candidates_that_several_knobs_make():
    def made(levels, ratio, kind=Kind.MEASURED):
        return Candidate(levels, 0.5, 1.0, ratio, kind, ModelCost(1, 1))

    tried = (
        made((0, 0, 0), 0.1),  # the dense network and one knob alone are in the table
        made((0, 2, 0), 0.1),
        made((1, 1, 0), 0.5),
        made((1, 0, 2), 0.8),
        made((1, 1, 1), 0.1, Kind.ESTIMATED),
        made((2, 1, 1), 0.4),
    )
    estimates = {(1, 1, 0): 0.6, (1, 0, 2): 0.8, (2, 1, 1): 0.2}
    assert table_error(lambda levels: estimates.get(levels, 9.0), tried) == pytest.approx(0.2)
    assert table_error(lambda levels: 1.0, tried[:2]) is None
