"""Rows of large maps stand for all positions: what they read is what the convolution reads there, and in the end all are seen."""

from __future__ import annotations

import pytest
import torch
from edge_compress.pipeline.network.row_sampling import output_strips, sampled_rows
from edge_compress.pipeline.score.curvature import local_hessian
from edge_compress.pipeline.score.layer_inputs import strip_columns
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


@given(height=st.integers(1, 300), width=st.integers(1, 300), positions=st.integers(1, 2000))
def test_rows_give_the_positions_asked_for_and_turns_see_all(height: int, width: int, positions: int) -> None:
    rows = sampled_rows(height, width, 0, positions)
    assert rows == sorted(set(rows))
    assert len(rows) * width >= min(positions, height * width)
    assert len(rows) == height or (len(rows) - 1) * width < positions
    assert {row for turn in range(height) for row in sampled_rows(height, width, turn, positions)} == set(range(height))


@pytest.mark.parametrize(
    "more", [{}, {"stride": 2}, {"dilation": 2}, {"padding": 2, "padding_mode": "reflect"}, {"kernel_size": (3, 1)}]
)
def test_strips_read_what_the_convolution_reads_in_these_rows(more: dict) -> None:
    layer = nn.Conv2d(3, 5, **{"kernel_size": 3, "padding": 1, **more})
    x = torch.randn(2, 3, 20, 21)
    out = layer(x).detach()
    rows = [0, 3, out.shape[2] - 1]
    found = layer.weight.detach().flatten(1) @ strip_columns(layer, x, rows) + layer.bias.detach()[:, None]
    torch.testing.assert_close(found, output_strips(out, rows), atol=1e-5, rtol=1e-4)


def test_a_hessian_of_some_rows_is_near_that_of_all_and_costs_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    smooth = nn.functional.interpolate(torch.randn(96, 3, 12, 12), size=(64, 64), mode="bilinear")
    batches = [(part, torch.zeros(len(part))) for part in smooth.split(8)]
    some = local_hessian(net, batches)
    monkeypatch.setattr("edge_compress.pipeline.network.row_sampling.sampled_rows.__defaults__", (10**9,))
    whole = local_hessian(net, batches)
    for name, expected in whole.items():
        assert float((some[name] - expected).norm() / expected.norm()) < 0.05
        assert not torch.equal(some[name], expected)
