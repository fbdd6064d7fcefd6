"""The artifact in its own runtime against the PyTorch model, and the gates it has to pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..targets.base import Target
from .accuracy import predictions, top1
from .data import Split
from .preprocess import to_input
from .types import Accuracy, Kind, OnDevice, Preprocess, Timing, Verdict

FloatArray = NDArray[np.float32]
SAME_CLASSES = 0.98  # share of the images that two machines' kernels, which round differently, must agree on


def answers(predict: Callable[[FloatArray], FloatArray], split: Split, prep: Preprocess, batch: int = 250) -> FloatArray:
    """Logits (N, classes) of every image of a split, by a function of network inputs (n, C, H, W)."""
    parts = []
    for first in range(0, len(split), batch):
        positions = np.arange(first, min(first + batch, len(split)))
        parts.append(predict(to_input(split.read(positions), prep).numpy()))
    return np.concatenate(parts)


def artifact_logits(target: Target, path: Path, split: Split, prep: Preprocess) -> FloatArray:
    """What the artifact answers, (N, classes), to every image of a split in its own runtime."""
    with target.runner(path) as run:
        return answers(run, split, prep)


def compare(
    artifact: FloatArray, pruned: FloatArray, dense: FloatArray, labels: NDArray[np.int64], kind: Kind = Kind.MEASURED
) -> Accuracy:
    """Accuracy of an artifact's logits beside those of the pruned and the dense PyTorch network on the same images.

    The interval of the drop is the normal one over paired outcomes (dense right minus artifact right, image by image).
    """
    answered = predictions(artifact)
    right, before = answered == labels, predictions(dense) == labels
    lost = before.astype(np.float64) - right.astype(np.float64)
    half = 1.96 * float(lost.std()) / math.sqrt(len(lost))
    drop = top1(dense, labels) - top1(artifact, labels)
    return Accuracy(
        top1=top1(artifact, labels),
        drop_pp=drop,
        agreement=float(((answered == predictions(pruned)) & (answered >= 0)).mean()),
        samples=len(labels),
        kind=kind,
        dense_top1=top1(dense, labels),
        drop_ci95_pp=(drop - 100.0 * half, drop + 100.0 * half),
    )


def judge(accuracy: Accuracy, latency: Timing, *, max_drop_pp: float, min_speedup: float, masked: bool = False) -> Verdict:
    """The gates. A speedup is real only when its whole interval lies above 1, whatever `min_speedup` allows.

    `masked`: connections were masked, which changes what is said of a missing speedup.
    """
    why = "; zeros are stored densely by this runtime and buy no latency" if masked else ""
    reasons = []
    if not accuracy.drop_pp <= max_drop_pp:
        reasons.append(f"accuracy: top-1 fell by {accuracy.drop_pp:.2f} points, at most {max_drop_pp:g} allowed")
    if latency.kind is not Kind.MEASURED:
        reasons.append(f"latency: not measured on a device (kind {latency.kind})")
    else:
        low, high = latency.speedup.ci95
        if not low > 1.0:
            reasons.append(f"speedup: not real, its 95 % interval [{low:.2f}, {high:.2f}] reaches 1.0{why}")
        elif not low >= min_speedup:
            reasons.append(f"speedup: lower end {low:.2f} of the 95 % interval is under --min-speedup {min_speedup:g}{why}")
    return Verdict(not reasons, tuple(reasons))


def verify_path(path: Path) -> list[str]:
    """What does not hold in a run folder: every file its report names, by size and digest. Empty when all is well.

    Args:
        path: a run folder, or one artifact file inside one.

    Raises:
        InputError: there is no report to check against.
    """
    folder = next((p for p in (path, *path.parents) if (p / "report.json").is_file()), None)
    if folder is None or not path.exists():
        raise InputError(f"nothing to verify at {path}", expected="a run folder, or an artifact inside one")
    try:
        report = json.loads((folder / "report.json").read_bytes())
        artifacts = {name: t["artifact"] for name, t in report["targets"].items() if t["artifact"] is not None}
        refs = {n: FileRef(str(a["path"]), str(a["sha256"]), int(a["size_bytes"])) for n, a in artifacts.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'report.json'} is no report", found=str(error), do="run again") from error
    findings, seen = [], False
    for name, ref in refs.items():
        file = folder / ref.path
        if path.is_file() and path.resolve() != file.resolve():
            continue
        seen = True
        if not file.is_file():
            findings.append(f"{name}: {ref.path} is missing")
        elif file.stat().st_size != ref.size_bytes:
            findings.append(f"{name}: {ref.path} has {file.stat().st_size} bytes, not {ref.size_bytes}")
        elif sha256_file(file) != ref.sha256:
            findings.append(f"{name}: {ref.path} has another SHA-256 than the report says")
    if path.is_file() and not seen and path.name not in ("report.json", "report.html", "report.md"):
        findings.append(f"{path.name} is not named in the report")
    return findings
