"""The recipes of examples/ through the whole pipeline: what pruning adds over the faster of the dense float and int8 files.

    python benchmarks/tasks.py [NAME...] --work FOLDER

Writes benchmarks/results/tasks.json: {"commit": ..., "processor": ..., "tasks": [{"name": "detect", ...}]}. A task that was run
before in the same work folder is read back; results of tasks that are not named stay as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import edge_compress
from edge_compress.devices.local import describe
from edge_compress.pipeline.codec import to_json
from edge_compress.pipeline.report.report import TargetReport

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tasks.json"
TARGETS = ("x86", "phone", "jetson")  # the plan is searched for the first; the others get the same network
OPTIONS: dict[str, dict[str, Any]] = {
    "classify": {"latency_budget": 0.9, "evaluations": 60, "finetune_epochs": 10},
    "detect": {"latency_budget": 0.56, "evaluations": 60, "finetune_epochs": 20},
    "segment": {"latency_budget": 0.42, "evaluations": 40, "finetune_epochs": 6},
    "embed": {"latency_budget": 0.45, "evaluations": 60, "finetune_epochs": 3},
    "keypoints": {"latency_budget": 0.68, "evaluations": 60, "finetune_epochs": 8},
    "faces": {"latency_budget": 0.77, "evaluations": 50, "finetune_epochs": 8},
}


def run(name: str, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One recipe's figures."""
    start = time.monotonic()
    folder = work / name
    result = edge_compress.compress(ROOT / "examples" / f"{name}.py", target=TARGETS, out=folder, **options)
    report = result.report
    found = report.targets["x86"]
    assert found.accuracy is not None
    assert found.latency is not None
    assert found.artifact is not None
    assert found.artifact.baseline is not None
    assert found.alone is not None
    assert found.alone.gain is not None
    over_int8 = found.alone.gain
    over_float = found.latency.speedup
    unpruned = min((over_int8, "int8"), (over_float, "float"), key=lambda pair: pair[0].median)
    return {
        "name": name,
        "options": options,
        "metric": {"name": report.metric.name, "unit": report.metric.unit},
        "dense": found.accuracy.dense_value,
        "value": found.accuracy.value,
        "drop": found.accuracy.drop,
        "drop_ci95": found.accuracy.drop_ci95,
        "interval": found.accuracy.interval,
        "agreement": found.accuracy.agreement,
        "precision": str(found.artifact.precision),
        "float_layers": found.artifact.options.get("excluded", ""),
        "unpruned": to_json(found.alone),
        "macs": [report.dense.macs, report.pruned.macs],
        "parameters": [report.dense.params, report.pruned.params],
        "prunable_macs_share": report.pruned.prunable_macs_share,
        "speedup_over_float": {"median": over_float.median, "ci95": over_float.ci95, "quality": found.latency.quality},
        "speedup_over_dense_int8": {"median": over_int8.median, "ci95": over_int8.ci95},
        "speedup_over_the_faster": {"median": unpruned[0].median, "ci95": unpruned[0].ci95, "of": unpruned[1]},
        "passed": found.verdict.passed,
        "others": {name: _other(report.targets[name]) for name in TARGETS[1:]},
        "minutes": round((time.monotonic() - start) / 60, 1),
    }


def _other(found: TargetReport) -> dict[str, Any]:
    """What became of another target's artifact."""
    artifact, accuracy, latency = found.artifact, found.accuracy, found.latency
    return {
        "status": found.status,
        "reasons": list(found.verdict.reasons),
        "precision": str(artifact.precision) if artifact else None,
        "size_bytes": artifact.size_bytes if artifact else None,
        "notes": list(artifact.notes) if artifact else [],
        "float_layers": artifact.options.get("excluded", "") if artifact else "",
        "value": accuracy.value if accuracy else None,
        "kind": str(accuracy.kind) if accuracy else None,
        "agreement": accuracy.agreement if accuracy else None,
        "speedup_over_float": to_json(latency.speedup) if latency else None,
        "unpruned": to_json(found.alone),
    }


def main() -> None:
    """Runs the recipes that are named, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*OPTIONS])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options instead of this file's")
    given = parser.parse_args()
    changed = {name: json.loads(value) for name, _, value in (text.partition("=") for text in given.set)}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    kept = json.loads(RESULTS.read_text())["tasks"] if RESULTS.is_file() else []
    for name in given.names:
        found = run(name, given.work, OPTIONS[name] | changed) | {"commit": commit}
        kept = [task for task in kept if task["name"] != name] + [found]
        whole = {"commit": commit, "processor": describe("onnxruntime")["cpu"], "tasks": kept}
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n")
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
