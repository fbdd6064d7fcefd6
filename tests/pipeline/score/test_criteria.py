"""Scores: their sign, their limits, and what they remove."""

from __future__ import annotations

import math

import finite_differences
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.types import Slice, Unit
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.exact_mode import weight_layers
from edge_compress.pipeline.score import criteria as hasa
from edge_compress.pipeline.score import curvature
from edge_compress.pipeline.score import masks as patterns
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

finite = st.floats(0.01, 10.0)


def pair(name: str, weights: list[float], h: list[float], lam: float) -> list[float]:
    layer = {"a": torch.tensor([weights], dtype=torch.float64)}
    return hasa.score(name, layer, {"a": torch.tensor([h], dtype=torch.float64)}, lam)["a"][0].tolist()


@settings(deadline=None)
@given(w=finite, low=finite, factor=st.floats(1.5, 100.0), lam=st.floats(0.05, 1.0))
def test_of_two_equal_weights_hasa_removes_the_flatter_and_the_published_formula_the_sharper(
    w: float, low: float, factor: float, lam: float
) -> None:
    flatter, sharper = pair("hasa", [w, -w], [low, low * factor], lam)
    assert flatter < sharper
    flatter, sharper = pair("published", [w, -w], [low, -low * factor], lam)
    assert flatter > sharper


@settings(deadline=None)
@given(h=finite, w=finite, factor=st.floats(1.01, 100.0), lam=st.floats(0.0, 1.0))
def test_of_two_equally_curved_weights_the_smaller_goes_first(h: float, w: float, factor: float, lam: float) -> None:
    for name in ("hasa", "published", "magnitude"):
        smaller, larger = pair(name, [w, -w * factor], [h, h], lam)
        assert smaller < larger


def test_the_scores_are_the_formulas() -> None:
    w, h = [2.0, -3.0, 1.0, 0.0], [0.5, 1.5, -4.0, 2.0]
    assert pair("published", w, h, 0.5) == pytest.approx([2 * math.exp(-0.25), 3 * math.exp(-0.75), math.exp(-2.0), 0.0])
    assert pair("hasa", w, h, 0.5) == pytest.approx([4 * 1.5**0.5, 9 * 2.5**0.5, 1.0, 0.0])  # mean of clamped h: 1
    assert pair("hasa", w, h, 1.0) == pytest.approx([6.0, 22.5, 1.0, 0.0])
    assert pair("magnitude", w, h, 0.7) == [2.0, 3.0, 1.0, 0.0]
    assert pair("hasa", w, h, 0.0) == [4.0, 9.0, 1.0, 0.0]  # the order of magnitude


def test_a_layer_without_curvature_keeps_the_order_of_magnitude() -> None:
    assert np.argsort(pair("hasa", [3.0, -1.0, 2.0], [0.0, -1.0, 0.0], 1.0)).tolist() == [1, 2, 0]


def test_random_scores_follow_the_seed_alone() -> None:
    weights = {"a": torch.zeros(20, 5), "b": torch.zeros(20, 5)}
    first, again, other = (hasa.score("random", weights, None, 0.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], other["a"])
    assert not torch.equal(first["a"], first["b"])
    assert 0.4 < float(first["a"].mean()) < 0.6


def test_for_a_least_squares_layer_the_score_is_the_true_increase_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 12)) * np.exp(rng.normal(size=12) / 2))
    layer = nn.Linear(12, 5, bias=False).double()
    with torch.no_grad():
        target = layer(x)
        increase = torch.zeros_like(layer.weight)
        for i, j in np.ndindex(5, 12):
            changed = layer.weight.clone()
            changed[i, j] = 0
            increase[i, j] = (x @ changed.T - target).square().sum(1).mean()
    hessian = curvature.local_hessian(layer, [(x, torch.zeros(200))])[""]
    diagonal = {"a": finite_differences.local_diagonal(hessian, layer.weight)}
    torch.testing.assert_close(layer.weight.detach().square() * diagonal["a"], increase)  # undamped it is equal
    ranks = {
        name: spearmanr(hasa.score(name, {"a": layer.weight}, diagonal, lam)["a"].flatten(), increase.flatten()).statistic
        for name, lam in (("hasa", 1.0), ("magnitude", 0.0), ("published", hasa.lambda_grid("published", diagonal)[3]))
    }
    assert ranks["hasa"] > 0.9
    assert ranks["hasa"] > ranks["magnitude"] + 0.02 > ranks["published"]


def test_units_get_the_sum_of_the_scores_of_all_their_connections() -> None:
    rng = np.random.default_rng(0)
    scores = {
        "conv": torch.from_numpy(rng.random((3, 2, 3, 3))),
        "next": torch.from_numpy(rng.random((5, 3, 1, 1))),
        "head": torch.from_numpy(rng.random((4, 6))),  # 3 channels of 2 positions, flattened
    }
    units = [
        Unit(
            (
                *(Slice("conv.weight", 0, (c,)), Slice("conv.bias", 0, (c,)), Slice("bn.weight", 0, (c,))),
                *(Slice("next.weight", 1, (c,)), Slice("head.weight", 1, (2 * c, 2 * c + 1))),
            )
        )
        for c in range(3)
    ]
    found = hasa.unit_scores(scores, units)
    for c in range(3):
        expected = scores["conv"][c].sum() + scores["next"][:, c].sum() + scores["head"][:, 2 * c : 2 * c + 2].sum()
        assert float(found[c]) == pytest.approx(float(expected))
    assert found.shape == (3,)
    assert hasa.unit_scores(scores, []).shape == (0,)


def test_units_are_scored_by_the_formula_with_their_curvature_along_their_weights() -> None:
    squares, form = torch.tensor([4.0, 1.0, 0.0, 2.0]).double(), torch.tensor([2.0, 3.0, 0.0, 0.0]).double()
    h = np.array([0.5, 3.0, 0.0, 0.0])  # v'Gv / |w|^2
    for lam in (0.0, 0.5, 1.0):
        expected = squares.numpy() * (h + h.mean()) ** lam
        np.testing.assert_allclose(hasa.removal_scores(squares, form, lam), expected, rtol=1e-9)
    torch.testing.assert_close(hasa.removal_scores(squares, form, 0.0), squares)
    assert hasa.removal_scores(squares, form, 1.0).argmin() == 2  # a dead unit goes first
    with pytest.raises(InputError, match=r"lambda of the score 'hasa': found -0\.5"):
        hasa.removal_scores(squares, form, -0.5)


@pytest.mark.parametrize("place", [("gone", 0, (0,)), ("conv", 2, (0,)), ("conv", 0, (3,)), ("conv", 1, (-1,))])
def test_a_unit_that_names_nothing_is_refused(place: tuple[str, int, tuple[int, ...]]) -> None:
    layer, axis, indices = place
    with pytest.raises(ValueError, match="layer"):
        hasa.unit_scores({"conv": torch.ones(3, 2, 3, 3)}, [Unit((Slice(f"{layer}.weight", axis, indices),))])


def test_lambda_is_the_best_of_the_grid_and_the_first_of_equals() -> None:
    asked = []

    def evaluate(lam: float) -> float:
        asked.append(lam)
        return {0.0: 0.5, 0.25: math.nan, 0.5: 0.9, 1.0: 0.9}[lam]

    best, tried = hasa.tune_lambda(evaluate, (0.0, 0.25, 0.5, 0.5, 1.0))
    assert best == 0.5
    assert asked == [0.0, 0.25, 0.5, 1.0]
    assert [lam for lam, _ in tried] == asked
    with pytest.raises(InputError, match="lambda cannot be tuned: found 1 tries, none a number"):
        hasa.tune_lambda(lambda lam: math.nan, (0.0,))
    with pytest.raises(InputError, match="lambda cannot be tuned"):
        hasa.tune_lambda(evaluate, ())


def test_grids_lie_in_each_scores_range_and_follow_the_scale_of_the_curvature() -> None:
    h = {"a": torch.tensor([[1e-6, -3e-6]])}
    assert hasa.lambda_grid("hasa", h) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert hasa.lambda_grid("published", h)[3] == pytest.approx(1 / 2e-6)
    assert hasa.lambda_grid("published", {"a": torch.zeros(2, 2)}) == (0.0,)
    assert hasa.lambda_grid("magnitude", None) == (0.0,)


def test_bad_requests_are_named() -> None:
    w, h = {"a": torch.ones(2, 2)}, {"a": torch.ones(2, 2)}
    with pytest.raises(InputError, match="--score: found 'obd', expected one of hasa, published, magnitude, random"):
        hasa.score("obd", w, h, 0.5)
    with pytest.raises(InputError, match=r"lambda of the score 'hasa': found 1\.5, expected 0 to 1"):
        hasa.score("hasa", w, h, 1.5)
    with pytest.raises(InputError, match="lambda of the score 'published': found nan"):
        hasa.score("published", w, h, math.nan)
    with pytest.raises(InputError, match="scores of layer 'a' are not finite"):
        hasa.score("magnitude", {"a": torch.tensor([[math.inf]])}, None, 0.0)
    with pytest.raises(ValueError, match="needs a curvature"):
        hasa.score("hasa", w, None, 0.5)
    with pytest.raises(ValueError, match="has shape"):
        hasa.score("hasa", w, {"a": torch.ones(4)}, 0.5)


def digits_top1_after(scores: tuple[tuple[str, float], ...], sparsity: float, seed: int) -> list[float]:
    """Test accuracy of a small network trained on digits, this share of its connections gone, nothing retrained.

    The second of each pair is lambda; for `seed` in units of 1/mean|h|.
    """
    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x, y = torch.from_numpy(digits.data[order] / 16).float(), torch.from_numpy(digits.target[order])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(300):
        chosen = torch.from_numpy(rng.integers(0, 1200, 128))
        optimiser.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimiser.step()
    weights = {name: layer.weight.detach() for name, layer in weight_layers(net).items()}
    h = curvature.gauss_newton(net, [(x[:1200], y[:1200])], draws=4, seed=seed)
    unit = hasa.lambda_grid("published", h)[3]

    def top1(masks: dict[str, Tensor]) -> float:
        masked = {f"{name}.weight": weights[name] * mask for name, mask in masks.items()}
        with torch.no_grad():
            return float((torch.func.functional_call(net, masked, (x[1200:],)).argmax(1) == y[1200:]).float().mean())

    assert top1({name: torch.ones_like(w) for name, w in weights.items()}) > 0.93
    return [
        top1(patterns.weight_masks(hasa.score(name, weights, h, lam * (unit if name == "published" else 1), seed=seed), sparsity))
        for name, lam in scores
    ]


def test_at_80_percent_hasa_keeps_what_the_published_sign_and_chance_destroy() -> None:
    rows = np.array(
        [
            digits_top1_after((("hasa", 0.5), ("magnitude", 0.0), ("published", 1.0), ("random", 0.0)), 0.8, seed)
            for seed in range(3)
        ]
    )
    hasa_top1, magnitude, published, chance = rows.mean(axis=0)
    assert hasa_top1 > max(published, chance) + 0.4, rows
    assert hasa_top1 > magnitude, rows
