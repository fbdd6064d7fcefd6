"""A user's own network with zero-padded shortcuts, own data and a settings file, through the whole pipeline in float."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import user_net
from cli_runs import USER_NET, Finished, Workshop, passed_but_for_speed, report_of
from edge_compress.pipeline.report.collect import packages_of
from edge_compress.pipeline.run import stages
from effects import Run, in_runtime, in_torch, inputs_of, percent_right


@pytest.fixture(scope="module")
def ended(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Finished]:
    folder = tmp_path_factory.mktemp("own")
    settings = folder / "edge-compress.toml"
    settings.write_text(
        f"""
        target = "x86"
        model = "{USER_NET}:padded"
        weights = "../{workshop.folder.name}/padded.pt"
        data = "npz:../{workshop.folder.name}/digits.npz"
        augment = "shift"
        precision = "fp32"
        score = "magnitude"
        search = "knapsack"
        latency-budget = 0.6
        evaluations = 10
        finetune-epochs = 2
        learning-rate = 0.0005
        max-accuracy-drop = 50
        out = "run"
        """
    )
    finished = workshop.call(["--config", str(settings), "--max-accuracy-drop", "10"])
    run = Run(folder / "run", user_net.padded, workshop.weights("padded"), f"npz:{workshop.npz}")
    return run, finished


def test_the_settings_file_and_the_flags_over_it_are_what_the_run_used(ended: tuple[Run, Finished]) -> None:
    run, finished = ended
    assert passed_but_for_speed(finished, run.folder), finished.err
    assert finished.out.splitlines()[0].startswith("x86: passed" if finished.code == 0 else "x86: failed")
    assert str(run.artifact) in finished.out
    report = report_of(run.folder)
    assert report["gates"]["max_accuracy_drop"] == 10
    assert report["model"]["name"] == "user_net.py:padded"
    assert report["pruned"]["search"]["method"] == "knapsack"
    assert report["pruned"]["score"] == "magnitude"
    assert report["data"]["classes"][3] == "three"
    assert report["data"]["splits"]["test"] == 360
    assert report["preprocess"]["mean"] == list(user_net.MEAN)
    assert report["targets"]["x86"]["artifact"]["precision"] == "fp32"


def test_padded_shortcuts_survive_the_removal_of_channels(ended: tuple[Run, Finished]) -> None:
    """The float artifact is the plan on the user's own factory: image by image, logit by logit."""
    run, _ = ended
    assert run.report["pruned"]["macs"] < 0.9 * run.report["dense"]["macs"]
    inputs = inputs_of(run.data.test)
    answers, expected = in_runtime(run.artifact, inputs), in_torch(run.pruned, inputs)
    np.testing.assert_allclose(answers, expected, rtol=1e-3, atol=1e-3)
    assert run.target["accuracy"]["top1"] == percent_right(answers, run.data.test)
    assert run.target["accuracy"]["agreement"] == 1.0
    assert percent_right(expected, run.data.test) > percent_right(in_torch(run.dense, inputs), run.data.test) - 10


def test_the_network_is_trained_at_the_given_learning_rate(ended: tuple[Run, Finished]) -> None:
    run, _ = ended
    (file,) = run.folder.glob("stages/finetune-*/result.json")
    assert json.loads(file.read_bytes())["settings"]["finetune"]["learning_rate"] == 0.0005


def test_the_baseline_is_the_users_dense_network(ended: tuple[Run, Finished]) -> None:
    run, _ = ended
    inputs = inputs_of(run.data.test)
    np.testing.assert_allclose(in_runtime(run.baseline, inputs), in_torch(run.dense, inputs), rtol=1e-3, atol=1e-3)


def test_changed_code_or_another_version_of_torch_with_the_same_weights_makes_all_again_and_that_is_said(
    workshop: Workshop, here: Callable[[list[str]], Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(user_net.__file__).read_text(encoding="utf-8")
    net = tmp_path / "net.py"
    net.write_text(source, encoding="utf-8")
    options = {"precision": "fp32", "search": "uniform", "evaluations": 1, "finetune_epochs": 0, "latency_budget": 1}
    arguments = workshop.arguments(tmp_path / "run", model=f"{net}:projected", min_speedup=0, **options)
    first = here(arguments)
    assert "sensitivity" in first.stages
    net.write_text(source.replace("relu", "gelu"), encoding="utf-8")
    monkeypatch.setattr(stages, "searched", Mock(side_effect=KeyboardInterrupt))  # far enough: it would search
    second = here(arguments)
    assert second.code == 130
    assert "changed since the last call in this folder: the model's code; all stages are made again" in second.err
    assert "dense baseline x86" in second.stages
    monkeypatch.setattr(stages, "packages_of", lambda chosen: packages_of(chosen) | {"torch": "1.0"})
    third = here(arguments)
    assert "changed since the last call in this folder: the version of torch; all stages are made again" in third.err
    assert "dense baseline x86" in third.stages
    fourth = here(arguments)
    assert "made again" not in fourth.err
    assert "dense baseline x86" not in fourth.stages
