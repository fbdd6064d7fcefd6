r"""What a user gets on x86 without pruning, beside a run's artifact: one interleaved measurement, one thread, batch 1.

    python benchmarks/peers.py runs/resnet20 --model resnet_cifar.py:resnet20 --weights resnet20.pt --data npz:cifar.npz \
        --out benchmarks/results/peers-resnet20.json

Rows: ONNX Runtime float (the baseline), ONNX Runtime int8 of the dense network (plain `quantize_static`, per channel), OpenVINO
float and OpenVINO + NNCF int8 where `pip install openvino nncf` was done, and the run's artifact. Every round times every row
once, in random order; the ratio is the median over rounds of baseline/row, its interval from the two-level bootstrap over
sessions (fresh processes). Accuracy is top-1 on the run's test split, each row in its own runtime.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from edge_compress.devices.measure.stats import two_level_bootstrap
from edge_compress.pipeline.config import load
from edge_compress.pipeline.data.preprocess import to_input
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.task.load import Loaded, load_subject
from edge_compress.pipeline.task.samples import calibration_set
from interleaved import ROUNDS, RUNTIMES, SESSIONS, Array, openvino_files, sessions_of
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Array, name: str) -> None:
        self._items = iter({name: image[None]} for image in images)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._items, None)


def prepare(run: Path, loaded: Loaded, folder: Path) -> dict[str, tuple[str, Path]]:
    """The rows' models: name -> (runtime, file)."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    artifact = run / report["targets"]["x86"]["artifact"]["path"]
    dense = artifact.parent / "baseline.onnx"
    images = np.concatenate(calibration_set(loaded.data.train, None, 500, 2))
    rows = {"onnxruntime float": ("onnxruntime", dense), "edge-compress": ("onnxruntime", artifact)}
    prepared, quantised = folder / "dense.prepared.onnx", folder / "dense.int8.onnx"
    quant_pre_process(str(dense), str(prepared))
    quantize_static(
        str(prepared), str(quantised), _Batches(images, "input"), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    rows["onnxruntime int8"] = ("onnxruntime", quantised)
    return rows | openvino_files(dense, images, folder)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder")
    for name in ("--model", "--weights", "--data"):
        parser.add_argument(name, required=True, help="as for edge-compress")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    loaded = load_subject(load(None, {"targets": ("x86",), "model": given.model, "weights": given.weights, "data": given.data}))
    folder = given.run / "peers"
    folder.mkdir(exist_ok=True)
    rows = prepare(given.run, loaded, folder)
    test = loaded.images.test
    inputs = to_input(test.read(np.arange(len(test))), loaded.subject.preprocess).numpy()
    collected = sessions_of(rows, inputs[:1])
    table = []
    for name, (runtime, path) in rows.items():
        ratios = [np.array(s["onnxruntime float"]) / np.array(s[name]) for s in collected]
        median, low, high = two_level_bootstrap(ratios, seed=0)
        predict = RUNTIMES[runtime](path)
        right = sum(int(predict(inputs[i : i + 1]).argmax()) == int(test.labels[i]) for i in range(len(test)))
        table.append(
            {
                "row": name,
                "top1": 100.0 * right / len(test),
                "p50_ms": float(np.median(np.concatenate([s[name] for s in collected]))),
                "speedup": {"median": median, "ci95": [low, high]},
            }
        )
        print(f"{name:24s} {table[-1]['top1']:6.2f} %  {table[-1]['p50_ms']:.3f} ms  {median:.2f}x [{low:.2f}, {high:.2f}]")
    settings = {"sessions": SESSIONS, "rounds": ROUNDS, "threads": 1, "samples": len(test), "kind": "measured"}
    atomic_write(given.out, json.dumps({"settings": settings, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
