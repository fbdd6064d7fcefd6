"""A recipe with several inputs and outputs through the whole pipeline: its metric sees what the artifact answered."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import edge_compress
import numpy as np
import pytest
import two_ended
from cli_runs import Finished
from edge_compress.pipeline.verify.golden import read
from edge_compress.targets.base import Arrays, Runner
from edge_compress.targets.x86 import X86
from printed import printed
from safetensors.numpy import load_file

pytestmark = [pytest.mark.timeout(900)]
RECIPE = Path(two_ended.__file__)
PHONE = find_spec("ai_edge_litert") is not None and find_spec("litert_torch") is not None
TARGETS = ("x86", "phone", "jetson") if PHONE else ("x86", "jetson")
OPTIONS: dict[str, Any] = {
    "evaluations": 5,
    "finetune_epochs": 1,
    "latency_budget": 0.95,
    "search": "knapsack",
    "max_drop": 100.0,
    "precision": "int8",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edge_compress.Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield edge_compress.compress(RECIPE, target=TARGETS, out=tmp_path_factory.mktemp("recipe") / "run", **OPTIONS)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_answers_with_all_outputs_and_is_judged_by_the_metric(result: edge_compress.Result, name: str) -> None:
    found = result.report.targets[name]
    assert found.accuracy is not None
    assert found.artifact is not None
    assert found.artifact.precision == "int8"
    assert found.accuracy.dense_value > 90.0  # of the samples have both right
    assert found.accuracy.value > 60.0
    assert found.accuracy.agreement > 0.95
    assert str(found.accuracy.kind) == ("estimated" if name == "jetson" else "measured")
    assert found.unpruned is not None
    assert found.unpruned.value > 90.0
    if found.golden is not None:
        kept = load_file(result.folder / found.golden.path)
        assert {kept[f"inputs_{k}"].dtype.kind for k in range(2)} == {"f", "i"}
        assert {kept[f"outputs_{k}"].shape[1:] for k in range(2)} >= {(3,)}


@pytest.mark.parametrize("name", [target for target in TARGETS if target != "jetson"])
def test_the_code_that_is_printed_answers_as_the_artifact_did(result: edge_compress.Result, name: str) -> None:
    golden = result.report.targets[name].golden
    assert golden is not None
    kept = read(result.folder / golden.path)
    code, predict = printed(result.folder, name)
    assert code in html.unescape((result.folder / "report.html").read_text(encoding="utf-8"))
    assert code in (result.folder / "report.md").read_text(encoding="utf-8")
    for i in range(4):
        answers = predict(*(array[i : i + 1] for array in kept.inputs))
        for found, wanted in zip(answers, kept.outputs, strict=True):
            np.testing.assert_allclose(found, wanted[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not PHONE, reason="LiteRT and its converter are not installed")
def test_the_code_for_compiled_models_answers_as_the_artifact_did(result: edge_compress.Result) -> None:
    found = result.report.targets["phone"]
    assert found.golden is not None
    kept = read(result.folder / found.golden.path)
    _, predict = printed(result.folder, "phone", "Python (CompiledModel)")
    answers = predict(*(array[:1] for array in kept.inputs))
    for answer, wanted in zip(answers, kept.outputs, strict=True):
        np.testing.assert_allclose(answer, wanted[:1], rtol=1e-4, atol=1e-5)


def test_the_report_speaks_of_the_recipes_metric_and_shows_its_pictures(result: edge_compress.Result) -> None:
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "both right" in page
    assert "top-1" not in page
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 4 * len(TARGETS)
    assert json.loads((result.folder / "report.json").read_text())["metric"]["name"] == "both right"


def test_the_module_that_comes_back_is_the_users_own_and_gives_what_it_gave(result: edge_compress.Result) -> None:
    module = result.module
    assert type(module).__name__ == "TwoEnded"  # of the recipe's file, which was imported under a name of its own
    assert sum(p.numel() for p in module.parameters()) == result.report.pruned.params < result.report.dense.params


def test_verify_measures_the_metric_again(
    result: edge_compress.Result, here: Callable[[list[str]], Finished], tmp_path: Path
) -> None:
    def verified(recipe: Path) -> Finished:
        return here(["verify", str(result.folder), "--recipe", str(recipe)])

    done = verified(RECIPE)
    assert done.code == 0, done.err
    accuracy = result.report.targets["x86"].accuracy
    assert accuracy is not None
    assert f"x86: both right {accuracy.value:.2f} % of 120 test samples: agrees with the recorded" in done.out
    other = tmp_path / "two_ended.py"
    other.write_text(RECIPE.read_text().replace("Squares(120, 4)", "Squares(120, 5)"))
    refused = verified(other)
    assert refused.code == 2
    assert "run was made with: found data of SHA-256" in refused.err


def test_a_metric_that_looked_at_the_dense_network_would_not_notice_an_artifact_that_answers_nothing(
    result: edge_compress.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(result.folder, copy)
    for stage in copy.glob("stages/accuracy-x86-*"):
        shutil.rmtree(stage)
    asked: list[Path] = []

    @contextmanager
    def mute(self: X86, path: Path, threads: int = 1) -> Iterator[Runner]:
        with real(self, path, threads) as predict:

            def zeros(inputs: Arrays) -> Arrays:
                found = predict(inputs)
                return tuple(np.zeros_like(part) for part in found)

            asked.append(path)
            yield zeros

    real = X86.runner
    monkeypatch.setattr(X86, "runner", mute)
    again = edge_compress.compress(RECIPE, target=TARGETS, out=copy, **OPTIONS)
    accuracy = again.report.targets["x86"].accuracy
    assert asked
    assert accuracy is not None
    assert accuracy.value == 0.0
    assert accuracy.dense_value > 90.0
