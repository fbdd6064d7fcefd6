"""How far the outputs of two networks agree."""

from __future__ import annotations

import pytest
import torch
from edge_compress.pipeline.task.task import agreement


def test_outputs_of_one_number_a_sample_do_not_agree_by_their_signs_alone() -> None:
    dense = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    unit = float(dense.std(correction=0))
    assert agreement((dense,), (dense,)).tolist() == [1.0] * 4
    assert agreement((dense + 0.5 * unit,), (dense,)).tolist() == pytest.approx([0.5] * 4)
    assert agreement((100.0 * dense,), (dense,)).max() == 0.0
    assert agreement((torch.tensor([[3.0]]),), (torch.tensor([[4.0]]),)).tolist() == pytest.approx([0.75])  # a sample alone


def test_equal_outputs_agree_also_where_they_are_zero_and_nan_never_does() -> None:
    zeros = torch.zeros(2, 3, 4)
    assert agreement((zeros,), (zeros,)).tolist() == [1.0, 1.0]
    assert agreement((zeros,), (zeros + 1,)).tolist() == [0.0, 0.0]
    assert agreement((zeros * torch.nan,), (zeros * torch.nan,)).tolist() == [0.0, 0.0]


def test_masks_and_class_numbers_agree_where_they_are_equal() -> None:
    mask, scores = torch.tensor([[[True, False]], [[True, True]]]), torch.ones(2, 3, 3)
    assert agreement((scores, ~mask), (scores, mask)).tolist() == [0.5, 0.5]
    assert agreement((scores, mask), (scores, mask)).tolist() == [1.0, 1.0]
