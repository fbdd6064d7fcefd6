import itertools
from dataclasses import replace

import numpy as np
import pytest
from edge_compress.pipeline.search import knapsack
from edge_compress.pipeline.search.knapsack import LossModel, profile, relax, solve
from edge_compress.pipeline.search.latency_model import LatencyModel
from edge_compress.pipeline.search.problem import SearchSettings, canonical, shares_of
from edge_compress.pipeline.search.search_log import SearchLog
from edge_compress.pipeline.types import Candidate, Kind, Knob, ModelCost
from hypothesis import given, settings
from hypothesis import strategies as st

KNOBS = (
    Knob("layer1.0.conv1", "channel", 16, (16, 12, 8, 4), "block:layer1.0.conv3"),
    Knob("layer1.0.conv2", "channel", 16, (16, 8), "block:layer1.0.conv3"),
    Knob("layer2.0.conv1", "channel", 16, (16, 8, 4)),
    Knob("conv1", "stream", 32, (32, 24, 16)),
    Knob("block:layer1.0.conv3", "block", 1, (1, 0)),
)
EVERY = sorted({canonical(KNOBS, ls) for ls in itertools.product(*(range(len(k.kept)) for k in KNOBS))})
HARD = SearchSettings("knapsack", 60, 0.5)


def total(rows, levels):
    return float(sum(row[i] for row, i in zip(rows, levels, strict=True)))


def made(levels, loss=0.0, ratio=0.5):
    return Candidate(tuple(levels), 1.0 - loss, loss, ratio, Kind.MEASURED, ModelCost(0, 0))


@st.composite
def tables(draw, low):
    number = st.floats(low, 1.0)
    return tuple(np.array([0.0, *(draw(number) for _ in k.kept[1:])]) for k in KNOBS)


@settings(deadline=None, max_examples=60)
@given(tables(0.0), tables(-0.2), st.floats(0.0, 1.0))
def test_solve_finds_what_brute_force_finds(loss, saving, share):
    needed = share * max(total(saving, ls) for ls in EVERY)
    slack = 1e-9 * len(KNOBS)  # what is needed less than this share of all savings counts as nothing
    found = solve(KNOBS, loss, saving, needed)
    # Rounding down in 4,000ths: what saves the most may be missed by that little, nothing else.
    safe = [total(loss, ls) for ls in EVERY if total(saving, ls) >= needed * (1 + len(KNOBS) / knapsack.BINS) + slack]
    any_ = min(total(loss, ls) for ls in EVERY if total(saving, ls) >= needed - slack)
    if found is None:
        assert not safe
        return
    assert canonical(KNOBS, found) == found
    assert total(saving, found) >= needed - slack
    assert any_ - 1e-9 <= total(loss, found) <= min(safe, default=np.inf) + 1e-9


def test_solve_says_when_nothing_saves_enough_and_prunes_nothing_when_nothing_is_needed():
    rows = tuple(np.arange(len(k.kept)) * 0.1 for k in KNOBS)
    assert solve(KNOBS, rows, rows, 100.0) is None
    assert solve(KNOBS, rows, rows, -1.0) == (0,) * len(KNOBS)


def test_solve_removes_a_block_rather_than_pay_inside_it_too():
    loss = tuple(np.array([0.0] + [1.0] * (len(k.kept) - 1)) for k in KNOBS)
    saving = tuple(np.array([0.0] + [0.5] * (len(k.kept) - 1)) for k in KNOBS)
    loss[4][1], saving[4][1] = 1.5, 0.9
    assert solve(KNOBS, loss, saving, 0.85) == (0, 0, 0, 0, 1)


def latency(levels):
    """Twice too good for streams, and too good by an offset."""
    share = shares_of(KNOBS, levels)
    return 1.0 - 0.2 * share[:3].sum() - 0.8 * share[3] - 0.1 * share[4]


def test_latency_model_is_the_table_until_something_is_measured():
    model = LatencyModel(KNOBS, latency, HARD)
    assert [model(ls) for ls in EVERY] == [latency(ls) for ls in EVERY]


def test_latency_model_learns_where_the_table_is_wrong():
    def real(levels):
        return latency(levels) + 0.4 * shares_of(KNOBS, levels)[3] + 0.02

    model = LatencyModel(KNOBS, latency, HARD)
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(EVERY))[:40]:
        model.observe(made(EVERY[i], ratio=real(EVERY[i])))
    before = max(abs(latency(ls) - real(ls)) for ls in EVERY)
    assert before > 0.2
    assert max(abs(model(ls) - real(ls)) for ls in EVERY) < 0.02
    predicted = [model.dense - total(model.rows(), ls) for ls in EVERY]
    np.testing.assert_allclose(predicted, [model(ls) for ls in EVERY], atol=1e-9)


def test_latency_model_never_makes_pruning_look_slower_than_its_table_does():
    model = LatencyModel(KNOBS, latency, HARD)
    for ls in EVERY[::5]:
        model.observe(made(ls, ratio=1.5 - 0.5 * latency(ls)))
    assert all(np.all(np.diff(row) > 0) for row in model.rows())


def test_loss_table_interpolates_and_never_falls():
    model = LossModel(KNOBS, made((0,) * 5), [])
    model.observe_single(0, 3, made((3, 0, 0, 0, 0), 0.3))
    model.observe_single(2, 1, made((0, 0, 1, 0, 0), 0.2))
    model.observe_single(2, 2, made((0, 0, 2, 0, 0), 0.1))
    model.observe_single(3, 1, made((0, 0, 0, 1, 0), 0.1))
    rows = model.rows()
    np.testing.assert_allclose(rows[0], [0, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(rows[2], [0, 0.2, 0.2])
    np.testing.assert_allclose(rows[3], [0, 0.1, 0.4])  # twice the share: four times the loss
    assert rows[1][1] > 0 < rows[4][1]


def test_loss_table_learns_from_whole_models():
    whole = [
        made(ls, 0.1 * total(tuple(np.arange(4) * m for m in (1, 1, 5, 1, 1)), ls)) for ls in EVERY if np.count_nonzero(ls) > 2
    ]
    model = LossModel(KNOBS, made((0,) * 5), whole)
    for k, knob in enumerate(KNOBS):
        for j in range(1, len(knob.kept)):
            model.observe_single(k, j, made(tuple(j if i == k else 0 for i in range(5)), 0.1 * j))
    drawn = model.draw(np.random.default_rng(0), 0.0)
    assert drawn[2][1] / drawn[0][1] > 1.5  # 1 in the single-knob table, 5 in the whole models
    again = model.draw(np.random.default_rng(1), 0.0)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not np.array_equal(model.draw(np.random.default_rng(1), 1.0)[2], drawn[2])


class Additive:
    knobs = KNOBS

    def evaluate(self, levels):
        return made(levels, 0.2 * float((shares_of(KNOBS, levels) ** 2).sum()), self.latency_estimate(levels))

    def latency_estimate(self, levels):
        return 1.0 - 0.2 * float(shares_of(KNOBS, levels).sum())


@pytest.mark.parametrize("count", [1, 4, 7, 100])
def test_profile_asks_for_the_dense_network_and_single_knobs_within_its_share(count):
    log = SearchLog(Additive(), SearchSettings("knapsack", 200, 0.9))
    profile(log, count)
    asked = [c.levels for c in log.tried]
    assert asked[0] == (0,) * 5
    assert all(np.count_nonzero(ls) == 1 for ls in asked[1:])
    assert len(asked) == len(set(asked)) == min(count, 1 + sum(len(k.kept) - 1 for k in KNOBS))
    if count >= 6:  # every knob once before any knob twice
        assert {int(np.flatnonzero(ls)[0]) for ls in asked[1:6]} == set(range(5))


def test_knapsack_finds_the_best_setting_of_an_additive_problem_right_after_its_profile():
    evaluator = Additive()
    singles = 1 + sum(len(k.kept) - 1 for k in KNOBS)
    log = SearchLog(evaluator, SearchSettings("knapsack", 60, 0.66))
    knapsack.run(log, 2 * singles, np.random.default_rng(0))
    within = [evaluator.evaluate(ls).accuracy for ls in EVERY if evaluator.latency_estimate(ls) <= 0.66]
    assert log.tried[singles].accuracy == pytest.approx(max(within))


def test_what_a_plan_leaves_of_the_budget_is_given_back_where_it_gains_most():
    """The leader keeps more until one level more would be over budget, by the latency that was measured there."""

    class Slower(Additive):
        def evaluate(self, levels):
            return replace(super().evaluate(levels), latency_ratio=self.latency_estimate(levels) + 0.02)

    evaluator = Slower()
    log = SearchLog(evaluator, SearchSettings("knapsack", 10, 0.8))
    deepest = tuple(len(k.kept) - 1 if k.kind != "block" else 0 for k in evaluator.knobs)
    leader = log.evaluate(deepest)
    loss = tuple(np.arange(len(k.kept), dtype=float) for k in evaluator.knobs)
    found = relax(log, loss)
    assert log.beside_leader(deepest) == pytest.approx(leader.spent)
    assert all(now <= before for now, before in zip(found, deepest, strict=True))
    assert found != deepest
    assert log.beside_leader(found) <= 0.8
    looser = [(*found[:i], level - 1, *found[i + 1 :]) for i, level in enumerate(found) if level]
    assert all(log.beside_leader(levels) > 0.8 for levels in looser)
