"""Masks: exact counts, the right connections, the right layout of 2:4."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.score import masks as patterns
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

levels = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf]), min_size=1, max_size=24)  # few values: many ties


def as_layers(values: list[list[float]]) -> dict[str, Tensor]:
    return {f"layer{i}": torch.tensor([v]) for i, v in enumerate(values)}


def lowest_first(values: list[float], count: int) -> list[bool]:
    gone = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    return [i not in gone for i in range(len(values))]


@settings(deadline=None)
@given(values=st.lists(levels, min_size=1, max_size=4), sparsity=st.floats(0, 1))
def test_a_global_mask_takes_exactly_the_lowest_and_of_equals_the_first(values: list[list[float]], sparsity: float) -> None:
    joined = [v for layer in values for v in layer]
    masks = patterns.weight_masks(as_layers(values), sparsity)
    found = [bool(b) for mask in masks.values() for b in mask.flatten()]
    assert found == lowest_first(joined, patterns.removed_count(len(joined), sparsity))
    assert [mask.shape for mask in masks.values()] == [(1, len(v)) for v in values]


@settings(deadline=None)
@given(values=st.lists(levels, min_size=2, max_size=4), data=st.data())
def test_each_layer_loses_exactly_its_own_share(values: list[list[float]], data: st.DataObject) -> None:
    shares = {f"layer{i}": data.draw(st.floats(0, 1)) for i in range(1, len(values))}
    masks = patterns.weight_masks(as_layers(values), shares)
    assert bool(masks["layer0"].all())  # not named: keeps everything
    for i, share in enumerate(list(shares.values()), start=1):
        count = patterns.removed_count(len(values[i]), share)
        assert masks[f"layer{i}"][0].tolist() == lowest_first(values[i], count)


def test_counts_are_the_nearest_whole_number() -> None:
    assert [patterns.removed_count(10, s) for s in (0.0, 0.04, 0.05, 0.29, 0.7, 0.96, 1.0)] == [0, 0, 1, 3, 7, 10, 10]
    assert patterns.removed_count(100, 0.29) == 29


@settings(deadline=None)
@given(
    outputs=st.integers(1, 3),
    fours=st.integers(1, 3),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (1, 2)]),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_two_four_keeps_the_two_best_of_every_four_input_channels_at_each_position(
    outputs: int, fours: int, kernel: tuple[int, ...], seed: int, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (outputs, 4 * fours, *kernel)
    values = rng.integers(0, 3, shape).astype(float) if ties else rng.random(shape)
    mask = patterns.two_four_mask(torch.from_numpy(values))
    assert mask.shape == shape
    # KRSC by hand: the input channel is the fastest axis, groups are four consecutive entries of it.
    rows = np.moveaxis(values, 1, -1).reshape(-1, 4)
    kept = np.moveaxis(mask.numpy(), 1, -1).reshape(-1, 4)
    for row, stays in zip(rows, kept, strict=True):
        assert stays.tolist() == lowest_first(row.tolist(), 2)


def test_a_layer_whose_inputs_do_not_come_in_fours_is_refused() -> None:
    assert [patterns.two_four_fits(shape) for shape in ((8, 3, 3, 3), (8, 1, 3, 3), (8, 8, 3, 3))] == [False, False, True]
    with pytest.raises(InputError, match=r"2:4: found a weight of shape \(8, 3, 3, 3\), expected a multiple of 4 inputs"):
        patterns.two_four_mask(torch.rand(8, 3, 3, 3))


def test_bad_requests_are_named() -> None:
    scores = as_layers([[1.0, 2.0]])
    with pytest.raises(InputError, match=r"sparsity: found 1\.2, expected 0 to 1"):
        patterns.weight_masks(scores, 1.2)
    with pytest.raises(InputError, match="sparsity: found nan"):
        patterns.weight_masks(scores, math.nan)
    with pytest.raises(InputError, match="sparsity of layer 'x': found no such layer, expected one of layer0"):
        patterns.weight_masks(scores, {"x": 0.5})
    with pytest.raises(InputError, match="scores of layer0: found NaN"):
        patterns.weight_masks(as_layers([[math.nan, 2.0]]), {"layer0": 0.5})
    with pytest.raises(InputError, match="found NaN"):
        patterns.two_four_mask(torch.full((1, 4), math.nan))
    assert patterns.weight_masks({}, 0.5) == {}
