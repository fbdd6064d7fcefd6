"""A run folder with real artifacts that takes a second to make: a linear classifier of the digits, solved, not trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from edge_compress import targets
from edge_compress.pipeline import config
from edge_compress.pipeline.codec import to_json
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.splits import network_inputs
from edge_compress.pipeline.files import file_ref
from edge_compress.pipeline.report.pages import write_report
from edge_compress.pipeline.report.report import decode
from edge_compress.pipeline.task.samples import ImageSamples
from edge_compress.pipeline.types import Accuracy, DataInfo, Kind, Preprocess, Subject, Verdict
from edge_compress.pipeline.verify import golden
from edge_compress.pipeline.verify.gates import packed
from fake_run import fake_results, fake_target, fake_timing, to_report
from onnx import TensorProto, helper, numpy_helper

PREP = Preprocess((0.3,), (0.4,), "none")


def small_run(folder: Path, *, passed: bool = True, **changes: Any) -> Path:
    """A finished run on the digits. Its artifacts and answers are real, its latencies are invented."""
    data = load_data("digits", seed=0)
    kept = folder / "artifacts" / "x86"
    kept.mkdir(parents=True)
    weight = _solved(data)
    (kept / "model.onnx").write_bytes(_network(weight, layers=0))
    (kept / "baseline.onnx").write_bytes(_network(weight, layers=3))
    (folder / "weights.safetensors").write_bytes(b"no network's")
    target, test = targets.load("x86"), data.test
    picked = np.arange(golden.SAMPLES) * 7
    with target.runner(kept / "model.onnx") as predict:
        at = golden.where(target)
        batch = ImageSamples(test, PREP).batch(picked)
        answers = golden.of_batch(batch, golden.as_tuple(predict(batch.artifact_inputs(target))), PREP, at)
        right = predict(network_inputs(test.read(np.arange(len(test))), PREP)).argmax(axis=1) == test.labels
    (kept / "golden.safetensors").write_bytes(golden.to_bytes(answers))
    top1 = 100 * float(right.mean())
    refs = {name: file_ref(kept / name, folder) for name in ("model.onnx", "baseline.onnx", "golden.safetensors")}
    base = fake_target()
    assert base.artifact is not None
    timing = fake_timing(device="local", environment={"runtime": "onnxruntime", "runtime_version": at.version, "cpu": at.cpu})
    result = dataclasses.replace(
        base,
        artifact=dataclasses.replace(
            base.artifact, file=refs["model.onnx"], baseline=refs["baseline.onnx"], input_shape=(1, 1, 8, 8)
        ),
        accuracy=Accuracy(top1, 0.2, 0.99, len(test), Kind.MEASURED, top1 + 0.2, (-0.5, 0.9), correct=packed(right)),
        latency=timing,
        golden=refs["golden.safetensors"],
        verdict=Verdict(passed, () if passed else ("accuracy: top-1 fell by 2.00 points, at most 1 allowed",)),
    )
    made = fake_results(evaluations=5)
    subject = Subject("net.py:linear", "34" * 32, _info(data.info), PREP, made.subject.cost, made.subject.signature)
    state = file_ref(folder / "weights.safetensors", folder)
    changes = {"targets": {"x86": result}, **changes}
    made = dataclasses.replace(
        made,
        subject=subject,
        checkpoint=dataclasses.replace(made.checkpoint, state=state),
        licenses={"torch": "BSD-3-Clause", "numpy": "Some words of its own", "onnxruntime": "MIT License"},
        **changes,
    )
    write_report(folder, to_report(made))
    (folder / "plan.json").write_text(json.dumps(to_json(made.plan), indent=1))
    flags = {"targets": ("x86",), "model": f"{folder}/net.py:linear", "weights": folder / "weights.safetensors", "out": folder}
    (folder / "config.toml").write_text(config.to_toml(config.load(None, flags)))
    return folder


def write(folder: Path, report: dict[str, Any]) -> None:
    """The report's three files, from its JSON."""
    write_report(folder, decode(report))


def change(folder: Path, **values: Any) -> dict[str, Any]:
    """Rewrite report.json alone, `change(folder, accuracy__top1=90.0)`: a key of the target's entry.

    The drop and the verdict of the run follow, so that the report does not contradict itself.
    """
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    for path, value in values.items():
        at = report["targets"]["x86"]
        *inner, last = path.split("__")
        for key in inner:
            at = at[key]
        at[last] = value
    accuracy = report["targets"]["x86"]["accuracy"]
    if "accuracy__top1" in values:
        accuracy["drop_pp"] = accuracy["dense_top1"] - accuracy["top1"]
    report["passed"] = all(target["verdict"]["passed"] for target in report["targets"].values())
    report.pop("sha256", None)  # as in a report of an earlier version
    (folder / "report.json").write_text(json.dumps(report))
    return report


def _info(info: DataInfo) -> DataInfo:
    return dataclasses.replace(info, classes=tuple(f"digit {name}" for name in info.classes))


def _solved(data: Any) -> np.ndarray[Any, Any]:
    """Weights (classes, pixels) and biases of a ridge regression on the training images."""
    split = data.train
    inputs = network_inputs(split.read(np.arange(len(split))), PREP).reshape(len(split), -1)
    design = np.hstack([inputs, np.ones((len(inputs), 1), np.float32)]).astype(np.float64)
    wanted = np.eye(10)[split.labels]
    gram = design.T @ design + np.eye(design.shape[1])
    return np.linalg.solve(gram, design.T @ wanted).T.astype(np.float32)


def _network(weight: np.ndarray[Any, Any], layers: int) -> bytes:
    """The classifier; `layers` convolutions before it that change nothing but what it takes."""
    nodes, held, at = [], {"w": weight[:, :-1], "b": weight[:, -1]}, "input"
    for layer in range(layers):
        same = np.zeros((1, 1, 3, 3), np.float32)
        same[0, 0, 1, 1] = 1.0
        held[f"c{layer}"] = same
        nodes.append(helper.make_node("Conv", [at, f"c{layer}"], [f"y{layer}"], pads=[1, 1, 1, 1]))
        at = f"y{layer}"
    nodes += [helper.make_node("Flatten", [at], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1)]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
