"""Networks are compared by all that they answer."""

from __future__ import annotations

import torch
from edge_compress.pipeline.axes.cutting.comparison import relative_difference


def test_masks_are_compared_beside_scores() -> None:
    scores, mask = torch.ones(2, 3), torch.tensor([True, False])
    assert relative_difference([scores, mask], [scores, mask]) == 0.0
    assert relative_difference([scores, ~mask], [scores, mask]) == 1.0
