"""Masks through the command line: zeros that are found, kept in training, stored in the artifact, and not sold as speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import torch
import user_net
from cli_runs import USER_NET, Finished, Workshop, report_of
from edge_compress.pipeline.axes.capture import capture
from onnx import numpy_helper
from safetensors.torch import load_file

Call = Callable[[list[str]], Finished]

BUDGET = 0.3
OPTIONS = {
    "model": f"{USER_NET}:padded",
    "pattern": "weight",
    "precision": "fp32",
    "latency_budget": BUDGET,
    "search": "knapsack",
    "evaluations": 9,
    "finetune_epochs": 1,
    "min_speedup": 1.5,  # the selecting convolution that stands for the padding is a little faster than Slice and Pad
}


def test_masks_in_float_keep_the_accuracy_and_are_no_faster(workshop: Workshop, tmp_path: Path, here: Call) -> None:
    folder = tmp_path / "run"
    arguments = workshop.arguments(folder, **{**OPTIONS, "weights": workshop.weights("padded")})
    ended = here(arguments)
    assert ended.code == 1, ended.err
    report = report_of(folder)
    pruned, target = report["pruned"], report["targets"]["x86"]

    # The gate: a mask buys no time, and the report says why.
    (reason,) = target["verdict"]["reasons"]
    assert reason.startswith("speedup: ")
    assert "zeros are stored densely by this runtime" in reason
    low, _ = target["latency"]["speedup"]["ci95"]
    assert (low <= 1.0) == ("not real" in reason)
    assert target["accuracy"]["drop"] < 5
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert "Density budget" in text
        assert "use --pattern channel" in text.replace("`", "").replace("<code>", "").replace("</code>", "")
    assert "Accuracy against connections kept" in (folder / "report.html").read_text()

    # The search: on density, with one latency for all.
    assert (pruned["pattern"], report["gates"]["density_budget"], report["gates"]["latency_budget"]) == ("weight", BUDGET, None)
    tried = pruned["search"]["tried"]
    assert len({c["latency_ratio"] for c in tried}) == 1
    assert len({c["density"] for c in tried}) > 5
    best = pruned["search"]["best"]
    assert 0.5 * BUDGET < best["density"] <= 1.02 * BUDGET

    # Plan, network and artifact: the same zeros.
    masks = load_file(folder / pruned["masks"]["path"])
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(best["density"] * total)
    student = capture(user_net.padded(), torch.zeros(1, 1, 8, 8)).module  # the user's own factory takes the weights
    student.load_state_dict(load_file(folder / pruned["state"]["path"]))
    graph = onnx.load(folder / target["artifact"]["path"]).graph
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    for name, mask in masks.items():
        weight = student.get_parameter(f"{name}.weight").detach()
        assert not weight[mask == 0].any()
        array = torch.from_numpy(stored[f"{name}.weight"].copy())
        array = array if array.shape == mask.shape else array.T
        assert not array[mask == 0].any()
        assert float((array[mask == 1] != 0).float().mean()) > 0.99
    dense = {n: p.numel() for n, p in user_net.padded().named_parameters()}
    zeros = sum(int((student.get_parameter(n) == 0).sum()) for n in dense)
    assert pruned["sparsity"] == zeros / sum(dense.values())
    assert pruned["sparsity"] > 0.6
    padding = capture(user_net.padded(), torch.zeros(1, 1, 8, 8)).module.get_parameter("layer1.shortcut_0.weight") != 0
    assert torch.equal(student.get_parameter("layer1.shortcut_0.weight") != 0, padding)

    # The same command again does nothing again.
    again = here(arguments)
    assert (again.code, again.stages) == (1, [])
    assert report_of(folder)["targets"]["x86"]["artifact"]["sha256"] == target["artifact"]["sha256"]


def test_dynamic_masks_move_with_the_training_and_keep_their_number(workshop: Workshop, tmp_path: Path, here: Call) -> None:
    folder = tmp_path / "run"
    options = {**OPTIONS, "weights": workshop.weights("padded"), "finetune_epochs": 3, "mask": "dynamic", "evaluations": 2}
    ended = here(workshop.arguments(folder, **options))
    assert ended.code == 1, ended.err
    pruned = report_of(folder)["pruned"]
    history = [epoch["search_value"] for epoch in pruned["finetune"]]
    best = max(i for i, value in enumerate(history, 1) if value == max(history))
    masks, state = (load_file(folder / pruned[name]["path"]) for name in ("masks", "state"))
    moved = 0
    for name, mask in masks.items():
        present = state[f"{name}.weight"] != 0
        assert 0.97 * mask.sum() <= present.sum() <= mask.sum()
        moved += int((present & ~mask.bool()).sum())
    assert (moved > 0) == (best > 1)  # the weights are those of the best epoch; masks move after each
    padding = capture(user_net.padded(), torch.zeros(1, 1, 8, 8)).module.get_parameter("layer1.shortcut_0.weight") != 0
    assert torch.equal(state["layer1.shortcut_0.weight"] != 0, padding)


def test_dynamic_masks_without_masks_are_wrong_input(workshop: Workshop, tmp_path: Path, here: Call) -> None:
    ended = here(workshop.arguments(tmp_path / "run", mask="dynamic"))
    assert ended.code == 2
    assert "--mask dynamic with --pattern channel" in ended.complaint


def test_a_budget_in_milliseconds_means_nothing_for_a_mask(workshop: Workshop, tmp_path: Path, here: Call) -> None:
    ended = here(workshop.arguments(tmp_path / "run", pattern="2:4", latency_budget="8ms"))
    assert ended.code == 2
    assert "8.0ms" in ended.complaint
    assert "share of connections" in ended.complaint
    assert not (tmp_path / "run").exists()
