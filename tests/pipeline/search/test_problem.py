import math
import warnings
from dataclasses import replace

import gymnasium.utils.env_checker
import numpy as np
import pytest
import stable_baselines3.common.env_checker
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.search.gym_env import PruningEnv
from edge_compress.pipeline.search.problem import (
    BudgetConstraint,
    SearchSettings,
    bounds,
    canonical,
    levels_of,
    reward,
    shares_of,
    signal,
)
from edge_compress.pipeline.types import Candidate, Kind, Knob, ModelCost
from hypothesis import given, settings
from hypothesis import strategies as st

KNOBS = (
    Knob("layer1.0.conv1", "channel", 16, (16, 12, 8, 4), "block:layer1.0.conv2"),
    Knob("layer1.1.conv1", "channel", 16, (16, 8), "block:layer1.1.conv2"),
    Knob("conv1", "stream", 32, (32, 24, 16)),
    Knob("block:layer1.0.conv2", "block", 1, (1, 0)),
    Knob("block:layer1.1.conv2", "block", 1, (1, 0)),
)
HARD = SearchSettings("ppo", 10, 0.5)


class Table:
    """Additive latency, accuracy falling with what is removed."""

    def __init__(self, savings=(0.1, 0.1, 0.3, 0.15, 0.15), knobs=KNOBS):
        self.knobs, self.savings, self.asked = knobs, savings, []

    def latency_estimate(self, levels):
        return 1.0 - float(np.dot(self.savings, shares_of(self.knobs, levels)))

    def evaluate(self, levels):
        self.asked.append(levels)
        removed = float(shares_of(self.knobs, levels).mean())
        return Candidate(levels, 0.9 - 0.5 * removed, 1 + removed, self.latency_estimate(levels), Kind.MEASURED, ModelCost(0, 0))


def candidate(**changes):
    base = Candidate((0,), 0.8, 0.5, 0.5, Kind.MEASURED, ModelCost(0, 0))
    return replace(base, **changes)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_environment_passes_both_checkers_without_a_warning(mode):
    env = PruningEnv(Table(), replace(HARD, mode=mode, budget=0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium.utils.env_checker.check_env(env, skip_render_check=True)  # there is nothing to render
        stable_baselines3.common.env_checker.check_env(env)


def test_action_is_a_threshold_per_knob_and_one_step_is_an_episode():
    table, asked = Table(), replace(HARD, budget=1.0)
    env = PruningEnv(table, asked)
    env.reset(seed=0)
    # shares 0.25, 0.6, 0.5, 0.4, 1.0; the last block is gone, and with it the choice inside it
    observation, value, terminated, truncated, info = env.step(np.array([-0.5, 0.2, 0.0, -0.2, 1.0], dtype=np.float32))
    assert table.asked == [(1, 0, 2, 0, 1)]
    assert (terminated, truncated) == (True, False)
    assert info["reward"] == reward(info["candidate"], asked) == info["candidate"].accuracy
    assert value == signal(info["candidate"], asked)
    expected = [0.25, 0.0, 0.5, 0.0, 1.0, info["candidate"].accuracy, info["candidate"].latency_ratio, 1.0, info["reward"]]
    np.testing.assert_allclose(observation, expected, rtol=1e-6)


def test_reset_keeps_the_last_candidate_unless_seeded_and_spends_nothing():
    table = Table()
    env = PruningEnv(table, replace(HARD, budget=0.9))
    fresh, _ = env.reset(seed=1)
    after = env.step(np.ones(5, dtype=np.float32))[0]
    np.testing.assert_array_equal(env.reset()[0], after)
    np.testing.assert_array_equal(env.reset(seed=1)[0], fresh)
    assert len(table.asked) == 1


def test_best_reward_in_the_observation_never_falls():
    env = PruningEnv(Table(), replace(HARD, budget=0.9))
    env.reset(seed=0)
    mild = env.step(np.full(5, -0.9, dtype=np.float32))[0][-1]
    assert env.step(np.ones(5, dtype=np.float32))[0][-1] == mild


shares = st.lists(st.floats(0, 1), min_size=5, max_size=5)
savings = st.lists(st.floats(-0.05, 0.3), min_size=5, max_size=5)


@settings(deadline=None, max_examples=200)
@given(shares, savings, st.floats(0.01, 1.0))
def test_every_action_is_within_budget_by_the_estimate(start, saved, tightness):
    table = Table(saved)
    constraint = BudgetConstraint(KNOBS, table.latency_estimate, replace(HARD, budget=10))
    fastest = table.latency_estimate(constraint.fastest)
    assert (
        fastest <= min(table.latency_estimate(tuple(ls)) for ls in np.ndindex(4, 2, 3, 2, 2) if canonical(KNOBS, ls) == ls) + 0.1
    )
    budget = max(fastest + (1 - fastest) * (1 - tightness), fastest, 1e-6)
    constraint = BudgetConstraint(KNOBS, table.latency_estimate, replace(HARD, budget=budget))
    clipped = constraint.clip(start)
    assert table.latency_estimate(constraint.levels(clipped)) <= budget
    assert ((clipped >= 0) & (clipped <= 1)).all()


@settings(deadline=None)
@given(shares, st.floats(0.56, 1.0))
def test_the_projection_raises_shares_together_and_only_when_over_budget(start, budget):
    table = Table()
    constraint = BudgetConstraint(KNOBS, table.latency_estimate, replace(HARD, budget=budget))
    clipped = constraint.clip(start)
    if table.latency_estimate(constraint.levels(start)) <= budget:
        np.testing.assert_array_equal(clipped, start)
    else:
        before = np.array(start)[np.array(start) < 0.999]
        moved = (clipped[np.array(start) < 0.999] - before) / (1 - before)
        assert moved.min() > 0
        np.testing.assert_allclose(moved, moved[0], atol=1e-6)


def test_the_projection_goes_no_further_than_needed():
    fine = (Knob("a", "channel", 1000, tuple(range(1000, 0, -1))),)
    table = Table((1.0,), fine)
    constraint = BudgetConstraint(fine, table.latency_estimate, replace(HARD, budget=0.5))
    assert table.latency_estimate(constraint.levels(constraint.clip([0.1]))) == pytest.approx(0.5, abs=0.002)


def test_soft_mode_projects_nothing():
    constraint = BudgetConstraint(KNOBS, Table().latency_estimate, replace(HARD, mode="soft", budget=1e-3))
    np.testing.assert_array_equal(constraint.clip([0.1] * 5), [0.1] * 5)


def test_unreachable_budget_names_the_fastest_ratio():
    with pytest.raises(InputError, match=r"0\.100.*at least 0\.375, the fastest reachable.*--latency-budget"):
        BudgetConstraint(KNOBS[:4], Table((0.3, 0.4, 0.4, 0.0), KNOBS[:4]).latency_estimate, replace(HARD, budget=0.1))


def test_the_projection_knows_that_the_narrowest_layer_need_not_be_the_fastest():
    knobs = (Knob("a", "channel", 4, (4, 3, 2)),)
    slow = {0: 1.0, 1: 0.4, 2: 0.6}
    constraint = BudgetConstraint(knobs, lambda levels: slow[levels[0]], replace(HARD, budget=0.5))
    assert constraint.fastest == (1,)
    assert constraint.levels(constraint.clip([1.0])) == constraint.levels(constraint.clip([0.0])) == (1,)


@given(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 2), st.integers(0, 1), st.integers(0, 1)))
def test_shares_of_levels_give_the_levels_again(levels):
    assert levels_of(KNOBS, shares_of(KNOBS, levels)) == levels
    env = PruningEnv(Table(), replace(HARD, budget=1.0))
    assert env.constraint.levels(env.shares(env.action(levels))) == canonical(KNOBS, levels)
    assert (np.abs(env.action(levels)) < 1).all()  # at the edge of the box noise would go one way only
    middles = (env.action(levels) + 1) / 2
    for knob, level, middle in zip(KNOBS, levels, middles, strict=True):  # and as far from the next level at either end
        low, high = bounds(knob, level)
        assert middle - low == pytest.approx(high - middle, abs=1e-6)
        assert {knob.level(low + 1e-6), knob.level(high - 1e-6)} == {level}


def test_knobs_inside_a_removed_block_do_not_matter_and_others_do():
    assert canonical(KNOBS, (3, 1, 2, 1, 0)) == (0, 1, 2, 1, 0)
    assert canonical(KNOBS, (3, 1, 2, 0, 0)) == (3, 1, 2, 0, 0)
    alike = (Knob("convs.0", "channel", 4, (4, 2)), Knob("block:convs.1", "block", 1, (1, 0)))  # names decide nothing
    assert canonical(alike, (1, 1)) == (1, 1)
    assert canonical((replace(alike[0], block="block:convs.1"), alike[1]), (1, 1)) == (0, 1)


def test_hard_reward_is_the_accuracy_until_two_percent_over_budget():
    assert reward(candidate(latency_ratio=0.3), HARD) == 0.8
    assert reward(candidate(latency_ratio=0.5 * 1.019), HARD) == 0.8
    assert reward(candidate(latency_ratio=0.5 * 1.12), HARD) == pytest.approx(0.8 - 0.5)


def test_soft_reward_is_alpha_accuracy_minus_beta_latency():
    assert reward(candidate(latency_ratio=0.6), replace(HARD, mode="soft", alpha=2, beta=0.5)) == pytest.approx(1.6 - 0.3)


def test_signal_tells_two_networks_at_chance_apart_and_survives_a_broken_loss():
    assert signal(candidate(accuracy=0.1, loss=2.3), HARD) > signal(candidate(accuracy=0.1, loss=3.3), HARD)
    assert signal(candidate(loss=math.nan), HARD) == signal(candidate(loss=math.inf), HARD) == signal(candidate(loss=9), HARD)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"method": "luck"}, "'luck'"), ({"mode": "x"}, "'x'"), ({"evaluations": 0}, "at least 1"), ({"budget": math.nan}, "nan")],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        replace(HARD, **changes)
    assert "\n" not in str(caught.value)
