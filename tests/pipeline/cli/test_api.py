"""The Python way in: what a call hands on to the pipeline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from edge_compress.pipeline.cli import api
from edge_compress.pipeline.task.recipe import Recipe


class Called(Exception):
    """The pipeline was called."""


def test_a_report_gives_the_command_of_the_call_and_not_that_of_the_notebooks_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline(*given: Any) -> int:
        raise Called(given[-1])

    monkeypatch.setattr(api, "run_pipeline", pipeline)
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json", "--token", "secret"])
    options: dict[str, Any] = {"latency_budget": (0.7, 0.5), "mean": [0.5, 0.4, 0.3], "accept_chance": True, "quiet": False}
    with pytest.raises(Called) as called:
        api.compress(target=("x86", "phone"), out=tmp_path / "a run", model="torchvision:resnet18", **options)
    out = f"'{tmp_path}/a run'"
    assert str(called.value) == (
        "edge-compress --model torchvision:resnet18 --latency-budget 0.7,0.5 --mean 0.5,0.4,0.3 --accept-chance"
        f" --target x86 --target phone --out {out}"
    )


def test_a_recipe_object_is_told_as_the_call_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def pipeline(*given: Any) -> int:
        raise Called(given[-1])

    monkeypatch.setattr(api, "run_pipeline", pipeline)
    with pytest.raises(Called) as called:
        api.compress(Recipe(dict, dict), latency_budget=0.5)
    assert str(called.value) == "edge_compress.compress(recipe, target='x86', latency_budget=0.5)"
