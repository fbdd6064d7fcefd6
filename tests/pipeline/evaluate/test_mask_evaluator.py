"""Masks in the pipeline: knobs, what a candidate is worth, the budget on density, plans, and zeros that reach the artifact."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import nets
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from edge_compress import targets
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.devices.measure.timing import Ratio
from edge_compress.pipeline.axes.capture import Captured, capture
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.evaluate import mask_evaluator as mask_evaluate
from edge_compress.pipeline.evaluate.evaluation_context import Bench
from edge_compress.pipeline.evaluate.mask_evaluator import MaskEvaluator
from edge_compress.pipeline.evaluate.reward_samples import RewardSamples
from edge_compress.pipeline.finetune.state import TrainingState
from edge_compress.pipeline.network.compute import CPU
from edge_compress.pipeline.options import Budget, Pattern, Precision
from edge_compress.pipeline.pattern.choice import pattern_for
from edge_compress.pipeline.pattern.masks import Masks
from edge_compress.pipeline.reconstruct.least_squares import solve_masked
from edge_compress.pipeline.reconstruct.sequential import sequential_masked
from edge_compress.pipeline.report.plots import svg as plots
from edge_compress.pipeline.report.report import Kept
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.score.connections import ConnectionScores
from edge_compress.pipeline.score.layer_moments import LayerMoments
from edge_compress.pipeline.score.mask_knobs import density, layer_mask, mask_knobs, masks_for, selections
from edge_compress.pipeline.search.problem import SearchSettings
from edge_compress.pipeline.search.search import search
from edge_compress.pipeline.signature import TOP1, image_signature
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import Batch
from edge_compress.pipeline.types import (
    Accuracy,
    Candidate,
    Kind,
    Knob,
    ModelCost,
    Percentiles,
    Plan,
    Sensitivity,
    Speedup,
    Timing,
)
from edge_compress.pipeline.verify.gates import Allowed, judge
from edge_compress.targets.base import BuildRequest, Interface, Limits, Structure
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

SHAPE = (1, 8, 8)
RATIO = 0.625
RANKING = Sensitivity("hasa", 0.5, {})


@functools.cache
def dense() -> nn.Module:
    """The CIFAR ResNets' layout, trained on digits: it has zero-padded shortcuts. Not to be changed."""
    return nets.trained(lambda: nets.OptionA(1, 10, (8, 16, 16)))


@functools.cache
def captured() -> Captured:
    return capture(dense(), torch.zeros(1, *SHAPE))


def network() -> nn.Module:
    return captured().module


@functools.cache
def moments() -> LayerMoments:
    return LayerMoments(network(), nets.digits()[0][:300])


def images() -> RewardSamples:
    inputs, labels = nets.digits()
    return RewardSamples(Batch(inputs[1200:1500], labels[1200:1500]), inputs[:200], Classification(), network())


class Device:
    """A prober and a meter that count how often they are asked."""

    def __init__(self) -> None:
        self.asked: list[Structure] = []

    def baseline(self) -> bytes:
        return b""

    def candidate(self, structure: Structure) -> bytes:
        self.asked.append(structure)
        return b""

    def macs(self, structure: Structure) -> int:
        return 1000

    def ratio(self, candidate: bytes) -> Ratio:
        return Ratio(RATIO)


def scores(name: str = "hasa") -> ConnectionScores:
    return ConnectionScores(network(), lambda: nets.digits()[0][:200], name, 0)


def evaluator(
    folder: Path, pattern: Pattern = Pattern.WEIGHT, score: str = "hasa", device: Device | None = None
) -> MaskEvaluator:
    device = device or Device()
    cache = LatencyCache({"a": "b"}, folder / "cache")
    given = images()
    bench = Bench(given.batch.inputs, given, device, cast(Any, device), cache, folder / "memo.jsonl")
    knobs = mask_knobs(captured(), pattern)
    return MaskEvaluator(captured(), image_signature(SHAPE, 10), pattern, knobs, scores(score), moments(), bench)


def ready(folder: Path, pattern: Pattern = Pattern.WEIGHT) -> MaskEvaluator:
    made = evaluator(folder, pattern)
    made.follow(RANKING)
    return made


def at_level(knobs: tuple[Knob, ...], level: int) -> tuple[int, ...]:
    return tuple(min(level, len(k.kept) - 1) for k in knobs)


# ---------------------------------------------------------------------------------------------- knobs


def test_every_layer_with_connections_of_its_own_is_a_knob() -> None:
    knobs = {k.name: k for k in mask_knobs(captured(), Pattern.WEIGHT)}
    layers = {n: m.weight.numel() for n, m in dense().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {name: k.size for name, k in knobs.items()} == layers  # without what stands for zero padding
    assert knobs["layer3.0.conv2"].kept == (2304, 1152, 691, 461, 230, 115)
    assert {k.kind for k in knobs.values()} == {"layer"}


def test_the_shares_of_a_layer_that_may_stay_can_be_given() -> None:
    knobs = {k.name: k for k in mask_knobs(captured(), Pattern.WEIGHT, (1.0, 0.75, 0.25))}
    assert knobs["layer3.0.conv2"].kept == (2304, 1728, 576)


def test_two_four_is_offered_where_inputs_come_in_fours() -> None:
    knobs = {k.name: k for k in mask_knobs(captured(), Pattern.TWO_FOUR)}
    assert "conv1" not in knobs  # it reads one grey channel
    assert knobs["linear"].kept == (160, 80)
    assert all(k.kept == (k.size, k.size // 2) for k in knobs.values())


@pytest.mark.parametrize("name", ["Mobile", "Normalised"])
def test_grouped_convolutions_and_linear_layers_on_maps_are_left_alone(name: str) -> None:
    found = {k.name for k in mask_knobs(nets.checked(name).coupling.walk.captured, Pattern.WEIGHT)}
    assert found
    assert not [n for n in found if "depthwise" in n or n in ("up", "down")]


def test_a_network_without_a_layer_for_the_pattern_is_refused() -> None:
    found = capture(nets.drawn(nets.NothingToCut), nets.images(1))
    with pytest.raises(InputError, match=r"2:4.*inputs come in fours"):
        mask_knobs(found, Pattern.TWO_FOUR)


def test_only_layers_that_select_channels_count_as_zero_padding() -> None:
    found = selections(network())
    assert set(found) == {"layer2.0.shortcut_0", "layer3.0.shortcut_0"}  # the second one only subsamples
    for name, ones in found.items():
        assert torch.equal(ones, network().get_parameter(f"{name}.weight") == 1)
    assert selections(nets.subject("PreActivation")[0]) == {}  # its 1x1 shortcuts are projections


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(0, 99), st.data())
def test_a_mask_keeps_exactly_the_knobs_count_and_the_highest_scores(
    o: int, c: int, k: int, seed: int, data: st.DataObject
) -> None:
    value = torch.rand(o, 4 * c, k, k, generator=torch.Generator().manual_seed(seed))
    size = value.numel()
    kept = tuple(sorted({size, *data.draw(st.lists(st.integers(1, size), min_size=1, max_size=4))}, reverse=True))
    for level, count in enumerate(kept):
        mask = layer_mask(value, Pattern.WEIGHT, Knob("a", "layer", size, kept), level)
        assert int(mask.sum()) == count
        assert value[mask].min() >= value[~mask].max() if count < size else True
    half = layer_mask(value, Pattern.TWO_FOUR, Knob("a", "layer", size, (size, size // 2)), 1)
    assert int(half.sum()) == size // 2
    assert nets.two_of_four(value * half)


def test_density_is_the_share_of_connections_in_the_masks() -> None:
    knobs = mask_knobs(captured(), Pattern.WEIGHT)
    levels = tuple(i % 6 for i in range(len(knobs)))
    masks = masks_for(Pattern.WEIGHT, knobs, levels, scores().at(0.5))
    assert density(knobs, levels) == sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert density(knobs, (0,) * len(knobs)) == 1.0


# ---------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("pattern", [Pattern.WEIGHT, Pattern.TWO_FOUR])
def test_a_candidate_answers_as_the_masked_and_solved_network_does(
    pattern: Pattern, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ready(tmp_path, pattern)
    levels = at_level(made.knobs, 2)
    candidate = made.evaluate(levels)
    expected = copy.deepcopy(network())
    with torch.no_grad():
        for name, mask in masks_for(pattern, made.knobs, levels, scores().at(0.5)).items():
            weight = expected.get_parameter(f"{name}.weight")
            weight.copy_(
                solve_masked(weight.flatten(1), moments().gram[f"{name}.weight"][:-1, :-1], mask.flatten(1)).view_as(weight)
            )
        given = images()
        given.restore(expected, given.dense_moments(network()), {})
        outputs, labels = expected.eval()(given.batch.inputs), given.batch.targets
    assert candidate.accuracy == pytest.approx(float((outputs.argmax(1) == labels).float().mean()), abs=0.005)
    assert candidate.loss == pytest.approx(float(F.cross_entropy(outputs, labels)), abs=1e-3)
    assert candidate.density == density(made.knobs, levels) == made.latency_estimate(levels) == candidate.spent


def test_every_mask_has_the_one_latency_that_was_measured(tmp_path: Path) -> None:
    device = Device()
    made = evaluator(tmp_path, device=device)
    made.follow(RANKING)
    found = [made.evaluate(at_level(made.knobs, level)) for level in range(3)]
    assert {c.latency_ratio for c in found} == {RATIO}
    assert {c.latency_kind for c in found} == {Kind.MEASURED}
    assert len({c.density for c in found}) == 3
    assert device.asked == [Structure({})]  # nothing is narrower
    assert made.bench.reused == 0
    again = evaluator(tmp_path, device=device)
    again.follow(RANKING)
    assert (again.bench.reused, len(device.asked)) == (1, 1)


def test_an_answer_depends_on_nothing_that_was_asked_before(tmp_path: Path) -> None:
    first, second = (ready(tmp_path / name) for name in ("a", "b") if not (tmp_path / name).mkdir())
    some, other = at_level(first.knobs, 3), at_level(first.knobs, 1)
    once, _ = first.evaluate(some), first.evaluate(other)
    _, twice = second.evaluate(other), second.evaluate(some)
    assert replace(once, seconds=0) == replace(twice, seconds=0)


def test_compensation_is_worth_more_than_the_mask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ready(tmp_path)
    solved = made.evaluate(at_level(made.knobs, 2))
    monkeypatch.setattr(mask_evaluate, "solve_masked", lambda weight, gram, mask: weight * mask)
    (tmp_path / "plain").mkdir()
    plain = ready(tmp_path / "plain")
    assert solved.loss < 0.8 * plain.evaluate(at_level(made.knobs, 2)).loss


def test_a_search_that_is_run_again_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ready(tmp_path)
    known = first.evaluate(at_level(first.knobs, 1))
    again = ready(tmp_path)
    monkeypatch.setattr(again, "_answer", lambda levels: pytest.fail("evaluated again"))
    assert again.evaluate(known.levels) == known


def test_lambda_is_the_best_one_shot_of_those_tried_or_the_one_given(tmp_path: Path) -> None:
    made = evaluator(tmp_path)
    ranking = made.rank(None)
    assert [lam for lam, _ in ranking.tried] == [0.0, 0.25, 0.5, 0.75, 1.0]
    best = max(value for _, value in ranking.tried)
    assert ranking.lambda_ == next(lam for lam, value in ranking.tried if value == best)
    assert len({value for _, value in ranking.tried}) > 1
    assert made.rank(0.25) == Sensitivity("hasa", 0.25, {})
    (tmp_path / "m").mkdir()
    assert evaluator(tmp_path / "m", score="magnitude").rank(None) == Sensitivity("magnitude", 0.0, {})


def test_unknown_score_is_refused() -> None:
    with pytest.raises(InputError, match="'luck'"):
        scores("luck")


# ---------------------------------------------------------------------------------------------- the budget


def test_search_keeps_to_a_budget_on_density_whatever_the_latency(tmp_path: Path) -> None:
    made = ready(tmp_path)
    result = search(made, SearchSettings("knapsack", 30, 0.3, limits="density"))
    assert result.best.density is not None
    assert 0.25 < result.best.density <= 0.3 * 1.02  # latency, 0.625, would be over it
    inside = [c for c in result.tried if c.spent <= 0.3 * 1.02]
    assert result.best.accuracy == max(c.accuracy for c in inside)
    uniform = made.evaluate(at_level(made.knobs, 2))  # 30 % of every layer
    assert result.best.loss < uniform.loss


def test_unreachable_density_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"density budget.*0\.010 of the connections.*at least 0\.05\d, the sparsest reachable"):
        search(ready(tmp_path), SearchSettings("uniform", 3, 0.01, limits="density"))


def test_half_of_the_connections_is_within_reach_of_two_four(tmp_path: Path) -> None:
    result = search(ready(tmp_path, Pattern.TWO_FOUR), SearchSettings("uniform", 1, 0.5, limits="density"))
    assert result.best.density == 0.5


class _Target:
    name, runtime = "x86", "onnxruntime"
    limits = Limits(8, (Precision.INT8,), (Pattern.CHANNEL, Pattern.WEIGHT))


def pattern_of(**changes: Any) -> Pattern:
    return pattern_for(replace(Config(("x86",)), **changes), cast(Any, [_Target()]))


def test_auto_is_what_buys_latency_and_masks_take_no_milliseconds() -> None:
    assert pattern_of() is Pattern.CHANNEL
    assert pattern_of(latency_budget=(Budget(ms=3.0),)) is Pattern.CHANNEL
    assert pattern_of(pattern=Pattern.WEIGHT) is Pattern.WEIGHT
    with pytest.raises(InputError, match=r"3\.0ms.*share of connections.*buy no latency"):
        pattern_of(pattern=Pattern.WEIGHT, latency_budget=(Budget(ms=3.0),))
    with pytest.raises(InputError, match=r"2:4 with --target x86.*channel, weight"):
        pattern_of(pattern=Pattern.TWO_FOUR)


def test_what_the_target_cannot_do_is_said_before_anything_is_computed() -> None:
    assert pattern_of(precision=Precision.INT8, max_size=1000) is Pattern.CHANNEL
    with pytest.raises(InputError, match=r"--precision fp16 with --target x86.*one of int8"):
        pattern_of(precision=Precision.FP16)
    with pytest.raises(InputError, match=r"--max-size with --pattern weight.*zeros of a mask are stored"):
        pattern_of(pattern=Pattern.WEIGHT, max_size=1000)


# ---------------------------------------------------------------------------------------------- plan and network


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(targets, "names", lambda: ("x86",))
    with RunFolder(Config(("x86",), out=tmp_path / "run"), lambda text: None) as folder:
        yield folder


def planned(folder: RunFolder, pattern: Pattern, level: int = 2) -> tuple[Masks, Plan]:
    way = Masks(captured(), image_signature(SHAPE, 10), pattern, scores(), folder.path, lambda: nets.digits()[0][:400], CPU)
    return way, way.plan(at_level(way.knobs, level), RANKING, folder.stage("search", "1", {}))


@pytest.mark.parametrize("pattern", [Pattern.WEIGHT, Pattern.TWO_FOUR])
def test_a_plan_names_a_file_with_the_masks_of_every_layer(pattern: Pattern, run_folder: RunFolder) -> None:
    way, plan = planned(run_folder, pattern)
    assert plan.masks is not None
    masks = load_file(run_folder.path / plan.masks.path)
    assert {name: (mask.dtype, mask.shape) for name, mask in masks.items()} == {
        k.name: (torch.uint8, network().get_parameter(f"{k.name}.weight").shape) for k in way.knobs
    }
    for knob in way.knobs:
        assert int(masks[knob.name].sum()) == knob.kept[min(2, len(knob.kept) - 1)]
        assert plan.removed_share[knob.name] == pytest.approx(1 - float(masks[knob.name].float().mean()))
    assert (plan.pattern, plan.score, plan.kept) == (pattern, "hasa", {})
    assert way.plan(at_level(way.knobs, 2), RANKING, run_folder.stage("search", "1", {})) == plan


def test_other_levels_and_another_lambda_have_other_masks(run_folder: RunFolder) -> None:
    way, plan = planned(run_folder, Pattern.WEIGHT)
    other = way.plan(at_level(way.knobs, 3), RANKING, run_folder.stage("search", "1", {}))
    assert plan.masks is not None
    assert other.masks is not None
    assert plan.masks.sha256 != other.masks.sha256
    fours, ranked = planned(run_folder, Pattern.TWO_FOUR, 1)
    again = fours.plan(at_level(fours.knobs, 1), replace(RANKING, lambda_=0.0), run_folder.stage("search", "1", {}))
    assert ranked.masks is not None
    assert again.masks is not None
    assert ranked.masks.sha256 != again.masks.sha256


def test_connections_chosen_by_what_removal_costs_lose_less_than_those_the_score_alone_would_take(run_folder: RunFolder) -> None:
    way, plan = planned(run_folder, Pattern.WEIGHT, 3)
    scored = masks_for(Pattern.WEIGHT, way.knobs, at_level(way.knobs, 3), scores().at(RANKING.lambda_))
    chosen = {name.removesuffix(".weight"): mask.bool() for name, mask in way.masks(plan).items()}
    assert all(int(chosen[name].sum()) == int(mask.sum()) for name, mask in scored.items())
    inputs, fixed = nets.digits()[0], selections(network())
    losses = []
    for masks in (scored, {name: chosen[name] for name in scored}):
        net = sequential_masked(network(), masks, inputs[:400], fixed=fixed)
        with torch.no_grad():
            losses.append(float((net(inputs[1200:]) - network()(inputs[1200:])).square().mean()))
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("pattern", [Pattern.WEIGHT, Pattern.TWO_FOUR])
def test_the_solved_network_is_zero_where_the_masks_are_and_pads_as_before(pattern: Pattern, run_folder: RunFolder) -> None:
    way, plan = planned(run_folder, pattern, 3)
    net = way.solved(plan, nets.digits()[0][:400])
    for name, mask in way.masks(plan).items():
        weight = net.get_parameter(name).detach()
        assert not weight[mask == 0].any()
        assert float((weight[mask != 0] != 0).float().mean()) > 0.9  # an input that never changes gets a 0 of its own
    assert torch.equal(net.get_parameter("layer2.0.shortcut_0.weight"), network().get_parameter("layer2.0.shortcut_0.weight"))
    zeros = sum(k.size - k.kept[min(3, len(k.kept) - 1)] for k in way.knobs)
    share = zeros / sum(p.numel() for p in dense().parameters())
    assert share <= way.sparsity(dense(), net) < share + 0.01
    assert way.sparsity(dense(), dense()) == 0.0


def test_masks_that_keep_everything_keep_the_function() -> None:
    knobs = mask_knobs(captured(), Pattern.WEIGHT)
    whole = masks_for(Pattern.WEIGHT, knobs, (0,) * len(knobs), scores().at(0.5))
    inputs = nets.digits()[0]
    net = sequential_masked(network(), whole, inputs[:400], fixed=selections(network()))
    with torch.no_grad():
        expected, found = network()(inputs[1200:]), net(inputs[1200:])
    assert float((found - expected).abs().mean()) < 0.05 * float(expected.abs().mean())
    assert float((found.argmax(1) == expected.argmax(1)).float().mean()) > 0.99


def test_layer_after_layer_repairs_more_than_every_layer_on_its_own(tmp_path: Path, run_folder: RunFolder) -> None:
    way, plan = planned(run_folder, Pattern.WEIGHT, 3)
    stitched = ready(tmp_path).evaluate(at_level(way.knobs, 3))
    net = way.solved(plan, nets.digits()[0][:400])
    with torch.no_grad():
        loss = float(F.cross_entropy(net(images().batch.inputs), images().batch.targets))
    assert loss < 0.8 * stitched.loss


def test_training_leaves_the_zeros_and_the_padding_alone(run_folder: RunFolder) -> None:
    way, plan = planned(run_folder, Pattern.TWO_FOUR, 1)
    student, masks = way.solved(plan, nets.digits()[0][:200]), way.masks(plan)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    state = TrainingState(student.train(), masks, 0.0)
    inputs, labels = nets.digits()
    for _ in range(3):
        F.cross_entropy(student(inputs[:64]), labels[:64]).backward()
        state.update(1e-2)
    after = dict(student.named_parameters())
    for name, mask in masks.items():
        assert not after[name][mask == 0].any()
    assert any(not torch.equal(after[name], before[name]) for name in masks)
    assert nets.two_of_four(after["layer3.0.conv2.weight"])


# ---------------------------------------------------------------------------------------------- artifact, gate, plot


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_zeros_reach_the_artifact_as_zeros(precision: Precision, run_folder: RunFolder, tmp_path: Path) -> None:
    way, plan = planned(run_folder, Pattern.TWO_FOUR, 1)
    student = way.solved(plan, nets.digits()[0][:200])
    batch = nets.digits()[0][:16].numpy()
    classes, target = tuple("0123456789"), targets.load("x86")
    baseline = target.baseline(dense(), Interface(image_signature(SHAPE), classes))
    request = BuildRequest(student, baseline, image_signature(SHAPE), classes, precision, [batch], lambda predict: 1.0, tmp_path)
    artifact = target.build(request)
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / artifact.file.path).graph.initializer}
    suffix = "weight" if precision is Precision.FP32 else "weight_quantized"
    masks = way.masks(plan)
    for knob in way.knobs:
        weight = torch.from_numpy(stored[f"{knob.name}.{suffix}"].astype(np.float32))
        mask = masks[f"{knob.name}.weight"]
        weight = weight if weight.shape == mask.shape else weight.T  # a linear layer may be stored inputs first
        assert not weight[mask == 0].any()
        assert float((weight[mask != 0] != 0).float().mean()) > 0.9
        assert nets.two_of_four(weight)


def test_a_missing_speedup_of_a_mask_is_explained() -> None:
    times = Percentiles(1.0, 1.1, 1.2)
    timing = Timing("local", Kind.MEASURED, times, times, Speedup(1.0, (0.99, 1.01)), 0.01, 5, 150, 1)
    accuracy = Accuracy(97.0, 0.1, 1.0, 100, Kind.MEASURED)
    limits = Allowed(TOP1, 1.0, 1.0)
    (reason,) = judge(limits, accuracy, timing, size_bytes=1, masked=True).reasons
    assert reason == (
        "speedup: not real, its 95 % interval [0.99, 1.01] reaches 1.0; "
        "zeros are stored densely by this runtime and buy no latency"
    )
    assert judge(limits, accuracy, timing, size_bytes=1).reasons == (reason.partition(";")[0],)
    faster = replace(timing, speedup=Speedup(1.5, (1.4, 1.6)))
    assert judge(limits, accuracy, faster, size_bytes=1, masked=True).passed


def test_the_trade_off_of_masks_is_drawn_over_the_connections_that_stay() -> None:
    points = [plots.Point(0.3, 80.0, Kind.MEASURED), plots.Point(0.5, 90.0, Kind.MEASURED)]
    label = plots.Label("p", "t", "d")
    svg = plots.tradeoff(points, points[0], None, 0.3, label, "density")
    assert "connections that stay" in svg
    assert "latency" not in svg
    assert "measured" not in svg  # they were counted
    assert "latency" in plots.tradeoff(points, points[0], None, 0.3, label)
    assert "30 %" in plots.kept_shares([Kept("conv", "layer", 9216, 2765, 0.3)], label)


def test_what_a_candidate_spends_is_its_density_where_it_has_one() -> None:
    candidate = Candidate((0,), 0.9, 0.1, 0.7, Kind.MEASURED, ModelCost(1, 1))
    assert candidate.spent == 0.7
    assert replace(candidate, density=0.0).spent == 0.0
