from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.devices.measure.timing import Ratio
from edge_compress.pipeline.axes.coupling import Coupling
from edge_compress.pipeline.axes.cutting.gate import Checked
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.evaluate.evaluation_context import Bench
from edge_compress.pipeline.evaluate.reward_samples import RewardSamples
from edge_compress.pipeline.evaluate.table_evaluator import table_error
from edge_compress.pipeline.evaluate.unit_evaluator import UnitEvaluator
from edge_compress.pipeline.evaluate.unit_prober import first_units, macs_left
from edge_compress.pipeline.network.cost import cost_of
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.pattern.knobs import knobs_for, plan_for
from edge_compress.pipeline.reconstruct.stitching import Fitter
from edge_compress.pipeline.score.layer_moments import LayerMoments
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import Batch
from edge_compress.pipeline.types import Candidate, Kind, ModelCost, Plan
from edge_compress.targets.base import Limits, Structure

NAME = "OptionA"
LIMITS = Limits(2, (Precision.FP32,), (Pattern.CHANNEL,))


class Prober:
    """Models that are their own description: the multiply-accumulates of each operator, and the structure itself."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling

    def candidate(self, structure: Structure) -> bytes:
        return json.dumps([list(macs_left(self.coupling, first_units(structure)).values()), structure.key()]).encode()


class Meter:
    """Every operator that is there takes a base time and a time for its work."""

    width = 1

    def __init__(self) -> None:
        self.asked = 0

    def ratio(self, model: bytes) -> Ratio:
        self.asked += 1
        return Ratio(sum(0.02 * bool(macs) + macs / 60000 for macs in json.loads(model)[0]))

    def ratios(self, models: list[bytes]) -> list[Ratio]:
        return [self.ratio(model) for model in models]


class Ordered(UnitEvaluator):
    """Goes by a ranking that is not the units' own order."""

    def __init__(self, checked: Checked, moments: LayerMoments, bench: Bench) -> None:
        units = nets.units(checked.coupling)
        self.order = {name: tuple(sorted(range(len(u)), key=lambda i: (i * 7 + 3) % 11)) for name, u in units.items()}
        knobs = knobs_for(checked.coupling, LIMITS)

        def planned(levels: tuple[int, ...]) -> Plan:
            return plan_for(knobs, levels, self.order, "")

        super().__init__(checked, image_signature(nets.SHAPE, nets.CLASSES), knobs, planned, moments, bench)


Make = Callable[..., tuple[Ordered, Meter]]


@pytest.fixture(scope="module")
def images() -> RewardSamples:
    labels = torch.randint(0, nets.CLASSES, (40,), generator=torch.Generator().manual_seed(0))
    return RewardSamples(Batch(nets.images(40, 7), labels), nets.images(32, 8), Classification(), nets.subject(NAME)[0])


@pytest.fixture(scope="module")
def moments() -> LayerMoments:
    return LayerMoments(nets.subject(NAME)[0], nets.images(50, 9))


@pytest.fixture
def make(images, moments, tmp_path) -> Make:
    checked = nets.checked(NAME)

    def build(memo: str = "memo.jsonl", cache: str = "cache", prober: object = None) -> tuple[Ordered, Meter]:
        meter = Meter()
        stored = LatencyCache({"device": "test"}, tmp_path / cache)
        bench = Bench(images.batch.inputs, images, prober or Prober(checked.coupling), meter, stored, tmp_path / memo)
        return Ordered(checked, moments, bench), meter

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


def some_levels(evaluator: Ordered, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(int(torch.randint(0, len(k.kept), (1,), generator=generator)) for k in evaluator.knobs)


def test_a_candidate_is_judged_by_its_own_answers(make, images):
    evaluator, _ = make()
    prober = evaluator.bench.prober
    for seed in range(3):
        levels = some_levels(evaluator, seed)
        plan = evaluator.plan(levels)
        small = evaluator.network(plan)
        with torch.no_grad():
            outputs = small(images.batch.inputs)
        found = evaluator.evaluate(levels)
        assert found.levels == levels
        assert found.accuracy == pytest.approx(float((outputs.argmax(1) == images.batch.targets).float().mean()))
        assert found.loss == pytest.approx(float(F.cross_entropy(outputs, images.batch.targets)), rel=1e-4)
        structure = evaluator.structure(plan)
        assert found.latency_ratio == Meter().ratio(prober.candidate(structure)).value
        assert found.latency_kind is Kind.MEASURED
        assert found.cost.params == sum(p.numel() for p in small.parameters())
        assert found.cost.macs == evaluator.macs(structure) == cost_of(small, torch.zeros(1, *nets.SHAPE)).macs
        assert found.seconds > 0
        assert evaluator.one_shot(plan) == (found.accuracy, found.loss)


def test_stitched_weights_are_those_of_the_kept_inputs_and_statistics_are_taken_again(make, moments):
    evaluator, _ = make()
    net, _ = nets.subject(NAME)
    plan = Plan(Pattern.CHANNEL, "", {"layer2.0.conv1": (1, 2, 6)})
    small = evaluator.network(plan)
    mask = np.isin(np.arange(8), (1, 2, 6))
    fitter = Fitter(moments)
    fitted = fitter.fitted("layer2.0.conv2.weight", mask)
    assert fitted is not None
    assert torch.equal(small.get_submodule("layer2.0.conv2").weight, fitted[0])
    assert fitter.fitted("layer2.0.conv2.weight", mask) is fitted  # solved once for each set of kept inputs
    assert torch.equal(small.get_submodule("layer3.0.conv1").weight, net.get_submodule("layer3.0.conv1").weight)
    means = [[n.get_submodule(name).running_mean for n in (small, net)] for name in ("bn1", "layer2.0.bn2")]
    torch.testing.assert_close(*means[0], rtol=1e-4, atol=1e-5)  # nothing is removed before it: as in the dense network
    assert not torch.allclose(*means[1], rtol=1e-2, atol=1e-3)  # three inputs are left to the layer before it
    assert not any(m.training for m in small.modules())


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


def single(evaluator: Ordered, knob: int, level: int) -> tuple[int, ...]:
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


def test_knobs_that_change_the_network_alike_share_one_entry(images, tmp_path):
    """Of four equal blocks none looks better than the others because its measurement was lucky."""
    deep = nets.OptionA()
    deep.layer2.extend(nets.PaddedBlock(8, 8, 1) for _ in range(2))
    checked = nets.checked_of(nets.drawn(lambda: deep))
    knobs, prober = knobs_for(checked.coupling, LIMITS), Prober(checked.coupling)
    unused: Any = SimpleNamespace(memory_bytes=0)  # no layer is re-fit

    def table(meter: Meter, name: str) -> dict[tuple[int, int], float]:
        cache = LatencyCache({"device": name}, tmp_path)
        evaluator = Ordered(checked, unused, Bench(images.batch.inputs, images, prober, meter, cache, tmp_path / name))
        evaluator.fill_table()
        entries = [(i, level) for i, k in enumerate(knobs) for level in range(1, len(k.kept))]
        return {entry: evaluator.latency_estimate(single(evaluator, *entry)) for entry in entries}

    noisy = table(NoisyMeter(), "noisy")
    blocks = [i for i, k in enumerate(knobs) if k.name.startswith("block:layer2.") and not k.name.endswith("2.0.conv2")]
    assert len(blocks) == 3
    assert len({noisy[i, 1] for i in blocks}) == 1
    stream = next(i for i, k in enumerate(knobs) if k.kind == "stream")
    assert noisy[stream, 1] not in {noisy[i, 1] for i in blocks}
    for (i, level), ratio in table(Meter(), "exact").items():  # what is pooled is equal but for the noise
        left = {} if knobs[i].kind == "block" else {knobs[i].name: (knobs[i].kept[level], knobs[i].size)}
        structure = Structure(left, (knobs[i].name,) if knobs[i].kind == "block" else ())
        assert ratio == pytest.approx(Meter().ratio(prober.candidate(structure)).value)


def test_an_estimate_of_one_knob_is_its_entry_and_of_several_what_their_layers_keep(make):
    evaluator, _ = make()
    dense = evaluator.latency_estimate((0,) * len(evaluator.knobs))
    measured = {}
    for i, knob in enumerate(evaluator.knobs):
        for level in range(len(knob.kept)):
            structure = evaluator.structure(evaluator.plan(single(evaluator, i, level)))
            measured[i, level] = evaluator.bench.latency_ratio(structure)
            assert evaluator.latency_estimate(single(evaluator, i, level)) == pytest.approx(measured[i, level])
    assert dense == measured[0, 0]
    at = {k.name: i for i, k in enumerate(evaluator.knobs)}
    one, other = at["layer2.0.conv1"], at["layer3.1.conv1"]
    apart = tuple(1 if i in (one, other) else 0 for i in range(len(at)))
    assert evaluator.latency_estimate(apart) == pytest.approx(measured[one, 1] + measured[other, 1] - dense, rel=0.02)
    deepest = tuple(0 if k.kind == "block" else len(k.kept) - 1 for k in evaluator.knobs)  # layers lose inputs and outputs
    really = evaluator.bench.latency_ratio(evaluator.structure(evaluator.plan(deepest)))
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
