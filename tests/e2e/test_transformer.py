"""A user's own transformer, which torch.fx cannot trace, through the whole pipeline in float."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import user_net
from cli_runs import USER_NET, Workshop, passed_but_for_speed, report_of
from edge_compress.pipeline.codec import from_json
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import Plan
from edge_compress.targets.x86 import TARGET
from effects import Run, in_runtime, in_torch, inputs_of, percent_right
from safetensors.torch import load_file, save_file
from torch import nn


def trained(path: Path) -> None:
    """The user's transformer, trained on the digits."""
    data = load_data("digits", seed=0)
    images, labels = inputs_of(data.train), torch.from_numpy(data.train.labels.copy())
    torch.manual_seed(0)
    network, epochs = user_net.attending(), 30
    steps = epochs * -(-len(labels) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(labels)).split(64):
            loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(images[part])), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    assert percent_right(in_torch(network.eval(), inputs_of(data.search)), data.search) > 90
    save_file(network.state_dict(), path)


@pytest.fixture(scope="module")
def run(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("transformer") / "run"
    weights = folder.with_name("attending.safetensors")
    trained(weights)
    arguments = workshop.arguments(
        folder,
        model=f"{USER_NET}:attending",
        weights=weights,
        latency_budget=0.6,
        precision="fp32",
        search="knapsack",
        max_accuracy_drop=20,
        finetune_epochs=1,
        evaluations=6,
    )
    finished = workshop.call(arguments)
    assert passed_but_for_speed(finished, folder), finished.err
    return Run(folder, user_net.attending, weights)


def pruned(run: Run) -> nn.Module:
    """The plan on the user's factory, with the weights of the run: nothing else of the run is used."""
    plan = from_json(Plan, json.loads((run.folder / "plan.json").read_text()))
    small = Units(run.dense, torch.rand(1, 1, 8, 8), image_signature((1, 8, 8)), TARGET.limits, "hasa", 0).blank(plan)
    small.load_state_dict(load_file(run.folder / run.report["pruned"]["state"]["path"]))
    return small.eval()


def test_units_of_a_transformer_are_removed_and_its_class_stays(run: Run) -> None:
    small = pruned(run)
    assert type(small) is user_net.Transformer
    assert run.report["pruned"]["params"] == sum(p.numel() for p in small.parameters())
    assert run.report["pruned"]["macs"] < run.report["dense"]["macs"]  # how many go depends on measured latencies
    kinds = {knob["kind"] for knob in run.report["pruned"]["knobs"]}
    assert {"mlp", "head"} <= kinds


def test_the_artifact_answers_as_the_pruned_module_does(run: Run) -> None:
    inputs = inputs_of(run.data.test)
    answers, expected = in_runtime(run.artifact, inputs), in_torch(pruned(run), inputs)
    np.testing.assert_allclose(answers, expected, rtol=1e-3, atol=1e-3)
    assert run.target["accuracy"]["top1"] == percent_right(answers, run.data.test)
    np.testing.assert_allclose(in_runtime(run.baseline, inputs), in_torch(run.dense, inputs), rtol=1e-3, atol=1e-3)


def test_the_report_says_how_units_were_scored_and_what_can_be_pruned(run: Run) -> None:
    notes = " ".join(run.report["notes"])
    assert "scored by OBS saliency" in notes
    assert "of the multiply-accumulates" in notes


def test_the_same_command_again_does_nothing_again(run: Run, workshop: Workshop) -> None:
    config = Path(run.folder) / "config.toml"
    before = report_of(run.folder)
    finished = workshop.call(["--config", str(config), "--out", str(run.folder)])
    assert passed_but_for_speed(finished, run.folder), finished.err
    assert "search" not in finished.stages
    assert report_of(run.folder)["pruned"]["state"] == before["pruned"]["state"]
