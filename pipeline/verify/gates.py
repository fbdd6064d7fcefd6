"""The gates of a run, and the figures they look at.

accuracy   the drop of top-1 on the test split is at most --max-accuracy-drop. The point estimate counts: the test split is the
           users' own, and the limit is what they accept on it; the paired interval is reported beside it.
speedup    the lower end of the 95 % interval is above 1 + the noise floor, and at least --min-speedup. The interval counts:
           a latency is a sample, and the difference of the baseline from itself is not a gain.
device     on another machine the artifact predicts the same class as here for at least 98 % of the images.
size       the file takes at most --max-size bytes.
"""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..task.inference import predictions, top1
from ..types import Accuracy, Kind, OnDevice, Timing, Verdict
from .statistics import paired_ci95

FloatArray = NDArray[np.float32]
SAME_CLASSES = 0.98  # share of the images that two machines' kernels, which round differently, must agree on


def compare(
    artifact: FloatArray, pruned: FloatArray, dense: FloatArray, labels: NDArray[np.int64], kind: Kind = Kind.MEASURED
) -> Accuracy:
    """Accuracy of an artifact's logits beside those of the pruned and the dense PyTorch network on the same images."""
    answered = predictions(artifact)
    right, before = answered == labels, predictions(dense) == labels
    lost, won = int((before & ~right).sum()), int((right & ~before).sum())
    return Accuracy(
        top1=top1(artifact, labels),
        drop_pp=top1(dense, labels) - top1(artifact, labels),
        agreement=float(((answered == predictions(pruned)) & (answered >= 0)).mean()),
        samples=len(labels),
        kind=kind,
        dense_top1=top1(dense, labels),
        drop_ci95_pp=paired_ci95(lost, won, len(labels)),
        correct=packed(right),
    )


def packed(right: NDArray[np.bool_]) -> str:
    """Which images were classified correctly, one bit each, for `Accuracy.correct`."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(accuracy: Accuracy) -> NDArray[np.bool_] | None:
    """Which images were classified correctly (samples,); None where that was not kept.

    Raises:
        ValueError: it does not fit the other figures of the accuracy.
    """
    if not accuracy.correct:
        return None
    bits = np.frombuffer(base64.b64decode(accuracy.correct, validate=True), np.uint8)
    if len(bits) != -(-accuracy.samples // 8):
        raise ValueError(f"{8 * len(bits)} bits for {accuracy.samples} images")
    right = np.unpackbits(bits)[: accuracy.samples].astype(bool)
    if abs(100.0 * right.mean() - accuracy.top1) > 1e-6:
        raise ValueError(f"{right.sum()} of {accuracy.samples} images are marked as correct, which is not {accuracy.top1:.2f} %")
    return right


def drop_complaint(accuracy: Accuracy, max_drop_pp: float) -> str:
    """Why the accuracy gate is not passed, in a sentence; empty where it is."""
    if accuracy.drop_pp <= max_drop_pp:
        return ""
    kind = "" if accuracy.kind is Kind.MEASURED else f" ({accuracy.kind})"
    return f"accuracy: top-1 fell by {accuracy.drop_pp:.2f} points{kind}, at most {max_drop_pp:g} allowed"


def speedup_complaint(latency: Timing, min_speedup: float, *, masked: bool = False) -> str:
    """Why the speedup gate is not passed, in a sentence; empty where it is. `masked` adds why masks give no speedup."""
    if latency.kind is not Kind.MEASURED:
        return f"latency: not measured on a device (kind {latency.kind})"
    why = "; zeros are stored densely by this runtime and buy no latency" if masked else ""
    (low, high), floor = latency.speedup.ci95, latency.noise_floor
    interval = f"95 % interval [{low:.2f}, {high:.2f}]"
    if not low > 1.0:
        return f"speedup: not real, its {interval} reaches 1.0{why}"
    if not low > 1.0 + floor:
        return f"speedup: none that can be told from noise, its {interval} reaches 1 + the noise floor of {floor:.3f}{why}"
    if not low >= min_speedup:
        return f"speedup: lower end {low:.2f} of the 95 % interval is below --min-speedup {min_speedup:g}{why}"
    return ""


def judge(
    config: Config,
    accuracy: Accuracy,
    latency: Timing,
    *,
    size_bytes: int,
    masked: bool = False,
    seen: OnDevice | None = None,
) -> Verdict:
    """The verdict of all gates that `config` sets on an artifact; `seen` where its device is another machine than this one."""
    reasons = [drop_complaint(accuracy, config.max_accuracy_drop)]
    if seen is not None and seen.agreement < SAME_CLASSES:
        reasons.append(
            f"device: on {seen.device} the artifact gives {100 * (1 - seen.agreement):.1f} % of {seen.samples} test images"
            f" another class than on this machine, at most {100 * (1 - SAME_CLASSES):g} % allowed"
        )
    if config.max_size is not None and size_bytes > config.max_size:
        reasons.append(f"size: the file takes {size_bytes:,} bytes, at most {config.max_size:,} allowed")
    reasons.append(speedup_complaint(latency, config.min_speedup, masked=masked))
    failed = tuple(reason for reason in reasons if reason)
    return Verdict(not failed, failed)
