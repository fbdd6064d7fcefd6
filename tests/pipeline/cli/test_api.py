"""The Python way in: what a call hands on to the pipeline."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edge_compress.pipeline.cli import api
from edge_compress.pipeline.codec import to_json
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.files import file_ref
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.report.report import to_text
from edge_compress.pipeline.task.recipe import Recipe
from edge_compress.pipeline.types import Plan
from fake_run import fake_results, to_report
from safetensors.torch import save
from torch import nn


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


@pytest.mark.parametrize("how", ["cut off", "missing", "another network's"])
def test_a_run_does_not_load_with_weights_that_are_not_its_own(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    state = run / "weights.safetensors"
    run.mkdir()
    state.write_bytes(save({"weight": torch.ones(4, 4)}))
    report = to_report(fake_results())
    pruned = dataclasses.replace(report.pruned, state=file_ref(state, run))
    (run / "report.json").write_text(to_text(dataclasses.replace(report, pruned=pruned)))
    (run / "plan.json").write_text(json.dumps(to_json(Plan(Pattern.CHANNEL, "hasa"))))
    if how == "cut off":
        state.write_bytes(state.read_bytes()[:50])
    elif how == "missing":
        state.unlink()
    else:
        state.write_bytes(save({"weight": torch.zeros(4, 4)}))
    with pytest.raises(InputError, match=r"weights.*the weights of the run"):
        api.load(run, nn.Identity)
