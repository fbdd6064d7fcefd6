from __future__ import annotations

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.reconstruct.least_squares import solve_intercept, solve_masked
from edge_compress.pipeline.reconstruct.stitching import Fitter
from edge_compress.pipeline.score.layer_moments import LayerMoments
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(k: int, n: int, seed: int = 0) -> torch.Tensor:
    return (torch.eye(k, dtype=torch.float64) + 0.5 * randn(k, k, seed=seed + 1)) @ randn(k, n, seed=seed)


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=30)
def test_solved_weights_are_the_least_squares_solution(k, outputs, seed, data):
    keep = torch.tensor(sorted(data.draw(st.sets(st.integers(0, k - 1), min_size=1))))
    x, weight = correlated(k, 60, seed), randn(outputs, k, seed=seed + 2)
    expected = torch.linalg.lstsq(x[keep].T, (weight @ x).T).solution.T
    mask = torch.zeros(outputs, k).index_fill_(1, keep, 1.0)
    torch.testing.assert_close(solve_masked(weight, x @ x.T, mask, damping=0.0)[:, keep], expected, rtol=1e-6, atol=1e-6)


@given(st.integers(2, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_solved_weights_answer_for_what_the_dense_inputs_were(k, seed):
    """The layer sees other inputs than the dense network's, and is to give what the dense layer gave."""
    dense, seen, weight = correlated(k, 60, seed), correlated(k, 60, seed), randn(3, k, seed=seed + 2)
    seen = seen + 0.3 * randn(k, 60, seed=seed + 3)
    keep = torch.arange(k)[::2]
    one = torch.cat([seen[keep], torch.ones(1, 60, dtype=torch.float64)])
    expected = torch.linalg.lstsq(one.T, (weight @ dense).T).solution.T
    found = solve_intercept(one @ one.T, weight @ dense @ one.T, weight[:, keep], 0.0, None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@given(st.integers(2, 8), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=20)
def test_every_row_is_solved_on_its_own_support(k, seed, data):
    rows = [data.draw(st.sets(st.integers(0, k - 1))) for _ in range(3)]
    mask = torch.zeros(3, k)
    for row, keep in enumerate(rows):
        mask[row, list(keep)] = 1
    x, weight = correlated(k, 60, seed), randn(3, k, seed=seed + 2)
    found = solve_masked(weight, x @ x.T, mask, damping=0.0)
    assert not found[mask == 0].any()
    for row, keep in enumerate(rows):
        if keep:
            at = torch.tensor(sorted(keep))
            expected = torch.linalg.lstsq(x[at].T, (weight[row] @ x)[:, None]).solution[:, 0]
            torch.testing.assert_close(found[row, at], expected, rtol=1e-6, atol=1e-6)


def twins() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of which the last two are the same and one is always zero, and weights."""
    x = randn(6, 80)
    x[5], x[2] = x[4], 0.0
    return x, randn(3, 6, seed=1)


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.01])
def test_a_singular_gram_matrix_is_solved(damping):
    x, weight = twins()
    whole = weight @ x
    for found in (
        solve_masked(weight, x @ x.T, torch.ones(3, 6), damping=damping) @ x,
        solve_masked(weight, x @ x.T, torch.tensor([[1, 1, 1, 1, 0, 1]] * 3), damping=damping) @ x,  # one of the twins is enough
    ):
        assert float((found - whole).norm() / whole.norm()) < max(2 * damping, 1e-5)


@pytest.mark.parametrize("columns_seen", [0, 1, 3])
def test_too_few_positions_give_finite_weights(columns_seen):
    x = randn(6, max(columns_seen, 1)) * bool(columns_seen)
    found = solve_masked(randn(3, 6, seed=1), x @ x.T, torch.tensor([[1, 1, 1, 1, 1, 0]] * 3))
    assert found.isfinite().all()
    assert float(found.norm()) < 1e3


def test_more_damping_stays_nearer_to_the_weights_of_before():
    x, weight = correlated(6, 80), randn(3, 6, seed=1)
    mask = torch.zeros(3, 6).index_fill_(1, torch.tensor([0, 2, 5]), 1.0)
    solved = [solve_masked(weight, x @ x.T, mask, damping=d) for d in (0.0, 0.01, 0.1, 1.0, 1e6)]
    moved = [float((found - weight * mask).norm()) for found in solved]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 1.2 * moved[3]
    assert moved[-1] < 1e-4


def test_a_hessian_that_cannot_be_factored_is_said(caplog):
    found = solve_masked(randn(3, 4), torch.full((4, 4), float("nan")), torch.ones(3, 4))
    assert found.shape == (3, 4)
    assert "not positive definite" in caplog.text


@given(st.integers(2, 8), st.integers(1, 20), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_what_loses_nothing_stays_as_it_is_however_little_was_seen(k, n, seed):
    """Inputs on very different scales, and fewer of them than weights: a layer from which nothing was taken is not touched."""
    x = correlated(k, n, seed) * torch.logspace(-4, 1, k, dtype=torch.float64)[:, None]
    weight = randn(3, k, seed=seed + 2)
    torch.testing.assert_close(solve_masked(weight, x @ x.T, torch.ones(3, k)), weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 5, 3, 2, 1), nn.Linear(6, 5)])
def test_a_compensated_layer_errs_hardly_more_than_the_best_fit(layer):
    mixed = torch.einsum("ij,njhw->nihw", torch.eye(6) + 0.6 * randn(6, 6).float(), nets.images(50, shape=(6, 6, 6)))
    inputs = mixed if isinstance(layer, nn.Conv2d) else mixed.mean((2, 3))
    keep = torch.tensor([0, 1, 3, 4])
    fitted = Fitter(LayerMoments(nn.Sequential(layer).eval(), inputs)).fitted("0.weight", np.isin(np.arange(6), keep))
    assert fitted is not None
    weight, shift = fitted
    assert weight.shape == (5, 4, *layer.weight.shape[2:])
    x = F.unfold(inputs, 3, 1, 1, 2).movedim(1, 0).flatten(1) if isinstance(layer, nn.Conv2d) else inputs.T
    area = len(x) // 6
    kept = x[(keep[:, None] * area + torch.arange(area)).flatten()]
    with torch.no_grad():
        wanted = layer.weight.flatten(1) @ x
        cut_error = (layer.weight[:, keep].flatten(1) @ kept - wanted).norm()
        one = torch.cat([kept, torch.ones(1, kept.shape[1])])
        best = torch.linalg.lstsq(one.T, wanted.T).solution.T @ one
        error = (weight.flatten(1) @ kept + shift[:, None] - wanted).norm()
    assert error < 0.8 * cut_error
    assert error < 1.05 * (best - wanted).norm()
