"""Sets of samples that do not fit in memory are smaller, and that is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edge_compress.pipeline.evaluate.reward_samples import reward_samples
from edge_compress.pipeline.network.compute import Compute
from edge_compress.pipeline.run.fewer_samples import fewer_samples
from edge_compress.pipeline.task import samples
from edge_compress.pipeline.task.load import Loaded, load_recipe
from edge_compress.pipeline.task.recipe import Recipe
from edge_compress.pipeline.task.samples import calibration_set, held_at_once, scoring_inputs
from torch import nn

EACH = 4 * 8  # bytes of a sample's inputs, and of its outputs


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    def datasets() -> dict[str, Any]:
        drawn = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
        pairs = [(sample, sample) for sample in drawn]
        return {"train": pairs[:240], "search": pairs[240:320], "test": pairs[320:]}

    return load_recipe(Recipe(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), datasets), 0)


def test_all_samples_are_used_and_nothing_is_said_where_they_fit(loaded: Loaded) -> None:
    assert fewer_samples(loaded, Compute()) == []
    assert len(scoring_inputs(loaded.data.train, 0)) == 240
    assert len(reward_samples(loaded, 1000, 0).batch.inputs) == 80


def test_no_set_takes_more_than_its_bound_and_the_report_says_so(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    train, compute = loaded.data.train, Compute(fixed_bytes=50 * 3 * EACH)  # inputs, outputs and dense outputs
    monkeypatch.setattr(samples, "SET_BYTES", 100 * EACH)
    assert len(scoring_inputs(train, 0)) == 100
    assert sum(len(part) for part in calibration_set(train, None, 500, 0)) == 100
    assert len(reward_samples(loaded, 1000, 0, compute).batch.inputs) == 50
    said = " ".join(fewer_samples(loaded, compute))
    for part in ("Scoring used 100 of 240", "Calibration, if the artifact is int8, used 100 of 240", "candidates used 50 of 80"):
        assert part in said


def test_a_bound_below_all_samples_still_leaves_some_to_judge_by(loaded: Loaded) -> None:
    assert held_at_once(loaded.data.train, 100, most_bytes=1) == 32
    assert held_at_once(loaded.data.train, 20, most_bytes=1) == 20
