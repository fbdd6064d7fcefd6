"""The artifact in its own runtime against the PyTorch model, and the gates it has to pass."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..task.inference import predictions, top1
from ..types import Accuracy, Kind, OnDevice, Timing, Verdict

FloatArray = NDArray[np.float32]
SAME_CLASSES = 0.98  # share of the images that two machines' kernels, which round differently, must agree on


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


def judge(
    accuracy: Accuracy,
    latency: Timing,
    *,
    max_drop_pp: float,
    min_speedup: float,
    masked: bool = False,
    seen: OnDevice | None = None,
    size_bytes: int = 0,
    max_size_bytes: int | None = None,
) -> Verdict:
    """The gates. A speedup is real only when its whole interval lies above 1, whatever `min_speedup` allows.

    Args:
        accuracy: of the artifact on this machine.
        latency: on its device.
        max_drop_pp: points of top-1 that may be lost.
        min_speedup: what the lower end of the interval must reach.
        masked: connections were masked, which changes what is said of a missing speedup.
        seen: the artifact's answers on its device, where that is another machine.
        size_bytes: of the artifact's file.
        max_size_bytes: what it may take; None: any.
    """
    why = "; zeros are stored densely by this runtime and buy no latency" if masked else ""
    reasons = []
    if not accuracy.drop_pp <= max_drop_pp:
        reasons.append(f"accuracy: top-1 fell by {accuracy.drop_pp:.2f} points, at most {max_drop_pp:g} allowed")
    if seen is not None and seen.agreement < SAME_CLASSES:
        reasons.append(
            f"device: on {seen.device} the artifact names another class than here for {100 * (1 - seen.agreement):.1f} % of"
            f" {seen.samples} test images, at most {100 * (1 - SAME_CLASSES):g} % allowed"
        )
    if max_size_bytes is not None and size_bytes > max_size_bytes:
        reasons.append(f"size: the file takes {size_bytes:,} bytes, at most {max_size_bytes:,} allowed")
    if latency.kind is not Kind.MEASURED:
        reasons.append(f"latency: not measured on a device (kind {latency.kind})")
    else:
        low, high = latency.speedup.ci95
        if not low > 1.0:
            reasons.append(f"speedup: not real, its 95 % interval [{low:.2f}, {high:.2f}] reaches 1.0{why}")
        elif not low >= min_speedup:
            reasons.append(f"speedup: lower end {low:.2f} of the 95 % interval is under --min-speedup {min_speedup:g}{why}")
    return Verdict(not reasons, tuple(reasons))
