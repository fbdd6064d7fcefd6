r"""The Jetson target's int8 files without a Jetson: accuracy in ONNX Runtime, our linter, NVIDIA's parser.

    python benchmarks/jetson_int8.py --model resnet_cifar.py:resnet20 --weights resnet20.pt --data npz:cifar.npz \
        --out benchmarks/results/jetson-int8.json

The model is built as `--target jetson` builds it, dense, ranges chosen on the search split. Its answers to the test split are
computed twice: with every Q/DQ pair where it stands (`simulated`, what the target reports), and as ONNX Runtime runs the file
when it is left to itself (`ort_default`; where that means int8 kernels, they saturate without VNNI). Neither is TensorRT. Two
networks of torchvision with random weights are only linted, parsed and built. No latency comes from here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from classifier import answers
from edge_compress.pipeline import config as settings
from edge_compress.pipeline.build.artifact import CALIBRATION_SAMPLES
from edge_compress.pipeline.codec import to_json
from edge_compress.pipeline.files import atomic_write, sha256_file
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.task.inference import top1
from edge_compress.pipeline.task.load import load_subject
from edge_compress.pipeline.task.samples import calibration_set
from edge_compress.pipeline.verify.statistics import paired_ci95
from edge_compress.targets import jetson
from edge_compress.targets.base import BuildRequest, Interface
from edge_compress.targets.onnx.int8 import has_vnni
from edge_compress.targets.onnx.run import predictor, simulate
from edge_compress.targets.tensorrt import parser_check as tensorrt_check
from edge_compress.targets.tensorrt.lint import lint

OTHERS = ("resnet50", "mobilenet_v2")


def verdicts(path: Path) -> dict[str, Any]:
    """What the linter and, where it is installed, NVIDIA's parser and builder say of a file."""
    data = path.read_bytes()
    model = onnx.load_model_from_string(data)
    kinds = [node.op_type for node in model.graph.node]
    lacking = tensorrt_check.missing()
    return {
        "sha256": sha256_file(path),
        "size_bytes": len(data),
        "opset": model.opset_import[0].version,
        "qdq_pairs": kinds.count("QuantizeLinear"),
        "linter": [str(finding) for finding in lint(model)],
        "parser": {"kind": "none", "reason": lacking} if lacking else to_json(tensorrt_check.check(data)),
    }


def request(module: Any, shape: tuple[int, int, int], images: list[Any], score: Any, folder: Path) -> BuildRequest:
    """What the target is asked to build."""
    classes = tuple(map(str, range(10)))
    baseline = jetson.TARGET.baseline(module, Interface(image_signature(shape), classes))
    return BuildRequest(module, baseline, image_signature(shape), classes, Precision.INT8, images, score, folder)


def subject(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Accuracy of the user's model in float and in int8, and the verdicts."""
    flags = {"targets": "jetson", "model": given.model, "weights": str(given.weights), "data": given.data}
    loaded = load_subject(settings.load(None, flags))
    data, prep = loaded.images, loaded.subject.preprocess
    images = calibration_set(loaded.data.train, jetson.TARGET, CALIBRATION_SAMPLES, 2)

    def score(predict: Any) -> float:
        return top1(answers(jetson.TARGET, predict, data.search, prep), data.search.labels)

    artifact = jetson.TARGET.build(request(loaded.module, data.info.image_shape, images, score, folder))
    assert artifact.baseline is not None
    model, baseline = folder / artifact.file.path, folder / artifact.baseline.path
    logits = {
        "float": answers(jetson.TARGET, simulate(baseline.read_bytes()), data.test, prep),
        "simulated": answers(jetson.TARGET, simulate(model.read_bytes()), data.test, prep),
        "ort_default": answers(jetson.TARGET, predictor(str(model)), data.test, prep),
    }
    names = {key: Path(getattr(given, key)).name for key in ("model", "data")}  # no folder of this machine
    found: dict[str, Any] = names | {"samples": len(data.test), "choices": artifact.choices}
    found["float_top1"] = top1(logits["float"], data.test.labels)
    for name in ("simulated", "ort_default"):
        picked, dense = logits[name].argmax(1), logits["float"].argmax(1)
        right, before = picked == data.test.labels, dense == data.test.labels
        found[name] = {
            "top1": top1(logits[name], data.test.labels),
            "drop": found["float_top1"] - top1(logits[name], data.test.labels),
            "drop_ci95": paired_ci95(int((before & ~right).sum()), int((right & ~before).sum()), len(right)),
            "agreement": float((picked == dense).mean()),
        }
    return found | {"options": artifact.options} | verdicts(model)


def other(name: str, folder: Path) -> dict[str, Any]:
    """A network of torchvision with random weights, on random images: whether TensorRT would take its file."""
    import torch
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.get_model(name).eval()
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((4, 3, 224, 224), dtype=np.float32)]
    jetson.TARGET.build(request(module, (3, 224, 224), images, lambda predict: float(len(predict(images[0][:1]))), folder))
    return {"model": f"torchvision:{name}", "weights": "random"} | verdicts(folder / "model.onnx")


def main() -> None:
    """Build, judge and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = []
    for make in (lambda folder: subject(given, folder), *(lambda folder, name=name: other(name, folder) for name in OTHERS)):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(make(Path(folder)))
        print(json.dumps(rows[-1], indent=1))
    machine = {"vnni": has_vnni(), **{name: metadata.version(name) for name in ("onnxruntime", "onnx", "torch")}}
    about = {"kind": "estimated", "runtime": "ONNX Runtime on the CPU, not TensorRT", "latency": None}
    atomic_write(given.out, json.dumps({"about": about, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
