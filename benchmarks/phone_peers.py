r"""Our .tflite files beside others for the same images, in LiteRT: one interleaved measurement, one thread, batch 1.

    python benchmarks/phone_peers.py runs/small/artifacts/phone/model.tflite --data npz:cifar.npz \
        --peer pretrainedResnet_quant.tflite --peer pretrainedResnet_large_int8.tflite --out benchmarks/results/peers-phone.json

Every file gets pixels: as they are where its input is float, through the input's own scale where it is int8 or uint8. Every
round times every file once, in random order; a ratio is the median over rounds of peer/file, its interval from the two-level
bootstrap over sessions (fresh processes). Accuracy is top-1 on the test split. The latency is that of LiteRT on this machine, not
of a phone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.measure.stats import percentiles, two_level_bootstrap
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.splits import Split
from edge_compress.pipeline.files import atomic_write, sha256_file


def top1(path: Path, test: Split) -> float:
    """Percent of the test images that a file classifies correctly."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    (image,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
    right = 0
    for pixels, label in zip(test.read(np.arange(len(test))), test.labels, strict=True):
        interpreter.set_tensor(image["index"], as_input(pixels, image)[None])
        interpreter.invoke()
        right += int(interpreter.get_tensor(logits["index"]).argmax()) == int(label)
    return 100.0 * right / len(test)


def as_input(pixels: np.ndarray[Any, Any], detail: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Pixels (H, W, C) as the input wants them."""
    if detail["dtype"] is np.float32:
        return pixels.astype(np.float32)
    scale, zero = detail["quantization"]
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.rint(pixels / scale) + zero, limits.min, limits.max).astype(detail["dtype"])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--peer", type=Path, action="append", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, help="as for edge-compress")
    parser.add_argument("--sessions", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    test = load_data(given.data, seed=0).test
    files = [*given.peer, *given.files]
    settings = TimingSettings(runtime="litert", sessions=given.sessions, min_pairs=150, max_pairs=150, half_width=1e-9)
    measured = LocalDevice().sessions(files[0], files[1:], settings)
    times = {path: [s.wall_ns for s in ((m.baseline, *m.candidates)[n] for m in measured)] for n, path in enumerate(files)}
    rows = []
    for path in files:
        p50, p90, p99 = percentiles(np.concatenate(times[path]) / 1e6)
        row: dict[str, Any] = {
            "file": path.name,
            "sha256": sha256_file(path),
            "size_bytes": path.stat().st_size,
            "top1": top1(path, test),
            "latency": {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99},
            "faster_than": {},
        }
        for peer in given.peer:
            if peer != path:
                ratios = [before / after for before, after in zip(times[peer], times[path], strict=True)]
                median, low, high = two_level_bootstrap(ratios, seed=0)
                row["faster_than"][peer.name] = {"median": median, "ci95": [low, high]}
        rows.append(row)
        print(f"{path.name:40s} {row['size_bytes']:>9,} bytes  {row['top1']:6.2f} %  {p50:.3f} ms")
    about = {"sessions": given.sessions, "pairs": 150, "threads": 1, "samples": len(test), "kind": "measured"}
    atomic_write(given.out, json.dumps({"settings": about, "machine": measured[0].machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
