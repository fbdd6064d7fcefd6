"""Which of the search's best plans is taken once their layers are solved one after another."""

from dataclasses import replace

import pytest
from edge_compress.pipeline.pattern.finalists import play_off
from edge_compress.pipeline.search.problem import SearchSettings
from edge_compress.pipeline.types import Candidate, Kind, ModelCost
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

HARD = SearchSettings("ppo", 1, 0.5)


def candidates(*found):
    """One for each (accuracy by the search, latency ratio); its position is its level."""
    return [Candidate((i,), a, 1.0, ratio, Kind.MEASURED, ModelCost(0, 0)) for i, (a, ratio) in enumerate(found)]


def played(some, worth, settings=HARD):
    """Names of the networks that were judged, and what came out."""
    asked = []

    def solve(candidate):
        net = fx.symbolic_trace(nn.Identity())
        net.level = candidate.levels[0]
        return net

    def judge(net):
        asked.append(net.level)
        return worth[net.level]

    return asked, play_off(some, settings, solve, judge)


def test_the_plan_that_is_best_once_solved_is_taken_whatever_the_search_foretold():
    some = candidates((0.816, 0.5), (0.807, 0.5), (0.805, 0.5))
    asked, (found, taken, net) = played(some, [(0.86, 0.4), (0.90, 0.3), (0.89, 0.3)])
    assert asked == [0, 1, 2]
    assert (taken, net.level) == (1, 1)
    assert [f.accuracy for f in found] == [0.86, 0.90, 0.89]
    assert [f.candidate for f in found] == some  # what the search saw stays as it was


def test_of_equals_the_faster_then_the_one_with_the_lower_loss_is_taken():
    some = candidates((0.8, 0.50), (0.7, 0.45), (0.7, 0.45))
    assert played(some, [(0.9, 0.1), (0.9, 0.5), (0.9, 0.3)])[1][1] == 2


def test_a_lone_plan_over_the_budget_is_taken_all_the_same():
    assert played(candidates((0.8, 0.9)), [(0.1, 3.0)])[1][1] == 0


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 0), (1.0, 1)])
def test_the_soft_mode_weighs_latency_against_what_a_plan_is_worth_solved(beta, expected):
    some = candidates((0.8, 0.9), (0.8, 0.5))
    assert played(some, [(0.9, 0.1), (0.8, 0.1)], replace(HARD, mode="soft", beta=beta))[1][1] == expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 0.5), st.floats(0, 1), st.floats(0, 5)), min_size=1, max_size=6))
def test_nothing_better_than_what_is_taken_was_among_them(rows):
    worth = [(accuracy, loss) for _, _, accuracy, loss in rows]
    _, (found, taken, net) = played(candidates(*((a, r) for a, r, _, _ in rows)), worth)
    assert net.level == taken
    assert found[taken].accuracy == max(f.accuracy for f in found)
