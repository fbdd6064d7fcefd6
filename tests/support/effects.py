"""What each stage must have done to a finished run, checked from its files alone with the tests' own arithmetic.

Every check is used twice: on a real run, where it must hold, and on a run whose stage was taken out, where it must fail.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import user_net
from batchnorm_statistics import reestimate_on
from cli_runs import BUDGET, EPOCHS, EVALUATIONS, report_of
from edge_compress.pipeline.axes.cutting.gate import Checked
from edge_compress.pipeline.codec import from_json
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.preprocess import augmented
from edge_compress.pipeline.data.splits import DataSet, Split
from edge_compress.pipeline.evaluate.unit_prober import removed
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.reconstruct.sequential import sequential
from edge_compress.pipeline.types import Plan, Preprocess
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

FloatArray = NDArray[np.float32]


@dataclass
class Run:
    """A finished run and what the tests make of its files."""

    folder: Path
    factory: Callable[[], nn.Module]
    weights: Path
    data_spec: str = "digits"

    @cached_property
    def report(self) -> dict[str, Any]:
        return report_of(self.folder)

    @property
    def target(self) -> dict[str, Any]:
        target: dict[str, Any] = self.report["targets"]["x86"]
        return target

    @cached_property
    def data(self) -> DataSet:
        return load_data(self.data_spec, seed=0)

    @cached_property
    def plan(self) -> Plan:
        return from_json(Plan, json.loads((self.folder / "plan.json").read_text()))

    @cached_property
    def dense(self) -> nn.Module:
        module = self.factory()
        module.load_state_dict(load_file(self.weights))
        return module.eval()

    @cached_property
    def checked(self) -> Checked:
        return nets.checked_of(self.dense, self.data.info.image_shape)

    @cached_property
    def pruned(self) -> nn.Module:
        """The plan on the user's factory, with the weights of the run: nothing else of the run is used."""
        small = nets.cut_to(self.checked, self.plan)
        small.load_state_dict(load_file(self.folder / self.report["pruned"]["state"]["path"]))
        return small.eval()

    @property
    def artifact(self) -> Path:
        path: str = self.target["artifact"]["path"]
        return self.folder / path

    @property
    def baseline(self) -> Path:
        path: str = self.target["artifact"]["baseline"]["path"]
        return self.folder / path


def inputs_of(split: Split) -> FloatArray:
    """Pixels to network inputs, as the user's file says: scaled to [0, 1], mean and deviation."""
    pixels = split.read(np.arange(len(split))).astype(np.float32).transpose(0, 3, 1, 2) / 255
    return np.asarray((pixels - np.float32(user_net.MEAN[0])) / np.float32(user_net.STD[0]), np.float32)


def in_runtime(file: Path, inputs: FloatArray) -> FloatArray:
    """Logits of a file in ONNX Runtime, one image at a time."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return np.concatenate([session.run(None, {name: inputs[i : i + 1]})[0] for i in range(len(inputs))])


def in_torch(module: nn.Module, inputs: FloatArray) -> FloatArray:
    with torch.no_grad():
        return np.asarray(module(torch.from_numpy(inputs)).numpy())


def percent_right(answers: FloatArray, split: Split) -> float:
    return 100 * float((answers.argmax(1) == split.labels).mean())


def loss_of(module: nn.Module, split: Split) -> float:
    return float(F.cross_entropy(torch.from_numpy(in_torch(module, inputs_of(split))), torch.from_numpy(split.labels)))


def sensitivity_puts_what_matters_first(run: Run) -> None:
    """Keeping the better half of every inner group's channels hurts less than keeping the worse half."""
    (stage,) = (run.folder / "stages").glob("sensitivity-*")
    order = json.loads((stage / "result.json").read_text())["result"]["order"]
    inner = [name for name in order if next(g for g in run.checked.coupling.groups if g.name == name).kind == "channel"]
    losses = []
    for half in (lambda ranked: ranked[: len(ranked) // 2], lambda ranked: ranked[len(ranked) // 2 :]):
        kept = {name: tuple(sorted(half(order[name]))) for name in inner}
        small = nets.cut_to(run.checked, Plan(Pattern.CHANNEL, "", kept))
        reestimate_on(
            small, [torch.from_numpy(inputs_of(run.data.train)[:500])]
        )  # else what is compared is how wrong the old statistics are
        losses.append(loss_of(small, run.data.search))
    assert losses[0] < losses[1]


def search_finds_a_smaller_network_within_the_budget(run: Run) -> None:
    search, dense, pruned = run.report["pruned"]["search"], run.report["dense"], run.report["pruned"]
    tried = [tuple(candidate["levels"]) for candidate in search["tried"]]
    assert search["evaluations"] == len(tried) == len(set(tried)) == EVALUATIONS
    assert search["best"]["latency_ratio"] <= 1.02 * BUDGET
    assert pruned["macs"] < 0.9 * dense["macs"]
    assert pruned["params"] < 0.9 * dense["params"]
    within = [c["accuracy"] for c in search["tried"] if c["latency_ratio"] <= 1.02 * BUDGET]
    assert [f["accuracy"] for f in search["finalists"]] == sorted(within, reverse=True)[: len(search["finalists"])]


def compensation_takes_the_plan_that_is_best_once_solved(run: Run) -> None:
    """Of the search's best plans; and what is said of it is true of the network in the folder."""
    search = run.report["pruned"]["search"]
    (taken,) = [f for f in search["finalists"] if f["taken"]]
    assert taken["levels"] == search["best"]["levels"]
    assert len(search["finalists"]) > 1
    assert taken["solved"] == max(f["solved"] for f in search["finalists"])
    (weights,) = (run.folder / "stages").glob("compensate-*/weights.safetensors")
    net = nets.cut_to(run.checked, run.plan)
    net.load_state_dict(load_file(weights))
    judged = run.data.search.head(1000)
    assert percent_right(in_torch(net.eval(), inputs_of(judged)), judged) == pytest.approx(100 * taken["solved"], abs=0.4)


def compensation_repairs_what_removal_broke(run: Run) -> None:
    """For a run without fine-tuning: its weights are better than the dense network's own with the same channels gone."""
    assert run.report["pruned"]["finetune"] == []
    bare = nets.cut_to(run.checked, run.plan)
    assert loss_of(run.pruned, run.data.search) < loss_of(bare, run.data.search)


def fine_tuning_learns(run: Run) -> None:
    """It moved the weights that compensation left, or says that no epoch matched them; it ended closer to the dense than the cut.

    Closer than the compensated network it need not be: two epochs do not repay what they disturb where little was removed.
    """
    history = run.report["pruned"]["finetune"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, EPOCHS + 1))
    images = augmented(
        run.data.train.read(np.arange(1000)), Preprocess(user_net.MEAN, user_net.STD, "shift"), torch.Generator().manual_seed(1)
    )
    gone = removed(run.plan, {g.name: len(g.units) for g in run.checked.coupling.groups})
    start = sequential(run.checked.coupling, gone, run.checked.sized, images)
    moved = [(a - b).norm() / a.norm() for a, b in zip(start.parameters(), run.pruned.parameters(), strict=True) if a.ndim == 4]
    reached = percent_right(in_torch(run.pruned, inputs_of(run.data.search)), run.data.search)
    best = max(epoch["search_value"] for epoch in history)
    if any("the initial weights were kept" in note for note in run.report["notes"]):
        assert reached > best
    else:
        assert min(moved) > 1e-3
        assert reached == pytest.approx(best, abs=0.4)  # one image
    bare = nets.cut_to(run.checked, run.plan)
    assert _divergence(run.dense, run.pruned, run.data.test) < _divergence(run.dense, bare, run.data.test)


def _divergence(dense: nn.Module, module: nn.Module, split: Split) -> float:
    """Kullback-Leibler, dense to module, mean over images."""
    one, other = (torch.from_numpy(in_torch(m, inputs_of(split))).log_softmax(1) for m in (dense, module))
    return float(F.kl_div(other, one, log_target=True, reduction="batchmean"))


def quantization_makes_it_small(run: Run) -> None:
    """Every weight takes one byte, but those of layers that the report says stayed in float."""
    assert run.target["artifact"]["precision"] == "int8"
    model = onnx.load(run.artifact)
    assert "DequantizeLinear" in {node.op_type for node in model.graph.node}
    weights = [i for i in model.graph.initializer if len(i.dims) >= 2]
    assert weights
    in_float = [name for name in run.target["artifact"]["options"]["excluded"].split(",") if name]
    assert sum(i.data_type != onnx.TensorProto.INT8 for i in weights) == len(in_float) <= 2
    assert run.target["artifact"]["size_bytes"] == run.artifact.stat().st_size


def calibration_fits_the_ranges(run: Run) -> None:
    """int8 answers as float does, and no other way of taking ranges was better on the search split."""
    assert run.target["accuracy"]["agreement"] >= 0.97
    chosen = run.target["artifact"]["options"]["ranges"]
    tried: dict[str, float] = {}
    for recipe in (line for line in run.target["artifact"]["choices"] if "ranges" in line):
        method, top1 = recipe.split(" ranges")[0], float(recipe.split()[-2])
        tried[method] = max(top1, tried.get(method, 0.0))
    assert len(tried) >= 4
    assert tried[chosen] >= max(tried.values()) - 0.03


def verification_reads_the_artifact(run: Run) -> None:
    """Accuracy and agreement are what the file itself answers in ONNX Runtime."""
    inputs, test, accuracy = inputs_of(run.data.test), run.data.test, run.target["accuracy"]
    answers, torch_answers = in_runtime(run.artifact, inputs), in_torch(run.pruned, inputs)
    assert accuracy["top1"] == percent_right(answers, test)
    assert accuracy["agreement"] == float((answers.argmax(1) == torch_answers.argmax(1)).mean())
    assert accuracy["samples"] == len(test)
    assert accuracy["drop"] == run.report["dense"]["top1"] - accuracy["top1"]
    assert run.report["dense"]["top1"] == percent_right(in_torch(run.dense, inputs), test)
    assert run.report["pruned"]["top1"] == percent_right(torch_answers, test)


def latency_is_that_of_the_two_files(run: Run) -> None:
    """The reported speedup is about what the tests' own stop watch says of the same two files."""
    low, high = run.target["latency"]["speedup"]["ci95"]
    assert 1 < low <= run.target["latency"]["speedup"]["median"] <= high
    reported = run.target["latency"]["speedup"]["median"]
    own = (_own_speedup(run.baseline, run.artifact) for _ in range(4))  # beside other tests a single one may be far off
    assert any(0.6 < speedup / reported < 1.6 for speedup in own)


def _own_speedup(baseline: Path, artifact: Path, rounds: int = 200) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(f), options, providers=["CPUExecutionProvider"]) for f in (baseline, artifact)]
    image = np.zeros((1, 1, 8, 8), np.float32)
    seconds = np.zeros((rounds, 2))
    for row in range(rounds):
        for column, session in enumerate(sessions):
            name = session.get_inputs()[0].name
            start = time.perf_counter()
            for _ in range(10):
                session.run(None, {name: image})
            seconds[row, column] = time.perf_counter() - start
    return float(np.median(seconds[rounds // 4 :, 0] / seconds[rounds // 4 :, 1]))


# stage -> what it must have done to the session's usual run
EFFECTS: dict[str, Callable[[Run], None]] = {
    "sensitivity": sensitivity_puts_what_matters_first,
    "search": search_finds_a_smaller_network_within_the_budget,
    "compensate": compensation_takes_the_plan_that_is_best_once_solved,
    "fine-tune": fine_tuning_learns,
    "quantization": quantization_makes_it_small,
    "calibration": calibration_fits_the_ranges,
    "verification": verification_reads_the_artifact,
    "latency": latency_is_that_of_the_two_files,
}
