"""The gates of a run, and the figures they look at.

accuracy   the drop of the metric on the test split is at most --max-drop (for top-1: --max-accuracy-drop).
           The point estimate counts: the test split is the
           users' own, and the limit is what they accept on it; the paired interval is reported beside it.
speedup    the lower end of the 95 % interval is above 1 + the noise floor, and at least --min-speedup. The interval counts:
           a latency is a sample, and the difference of the baseline from itself is not a gain.
device     on another machine the artifact predicts the same class as here for at least 98 % of the images, or its outputs
           agree by as much.
size       the file takes at most --max-size bytes.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..options import Drop
from ..signature import TOP1, Metric
from ..types import Accuracy, Kind, OnDevice, Timing, Verdict
from .statistics import drop_ci95, is_share

if TYPE_CHECKING:  # torch comes with it
    from ..task.task import Judge

SAME_CLASSES = 0.98  # share of the images that two machines' kernels, which round differently, must agree on


@dataclass(frozen=True)
class Allowed:
    """What a run allows."""

    metric: Metric
    max_drop: float  # in the metric's unit
    min_speedup: float
    max_size: int | None = None


def allowed(config: Config, metric: Metric, dense: float) -> Allowed:
    """The limits of a run; `dense`: the dense network's value of the metric on the test split, which drops in per cent are of."""
    return Allowed(metric, drop_allowed(config, metric).of(dense), config.min_speedup, config.max_size)


def drop_allowed(config: Config, metric: Metric) -> Drop:
    """How much worse the metric may get: as given, else `max_accuracy_drop` points of top-1, and 1 % of anything else."""
    if config.max_drop is not None:
        return config.max_drop
    return Drop(config.max_accuracy_drop) if metric == TOP1 else Drop(1.0, relative=True)


def compare(metric: Metric, artifact: Judge, dense: Judge, agreement: float, samples: int, kind: Kind) -> Accuracy:
    """Accuracy of an artifact beside the dense PyTorch network on the same samples; `agreement`: with the pruned one."""
    value, before, each = artifact.value(), dense.value(), artifact.per_sample()
    interval, what = drop_ci95(metric, dense, artifact, samples)
    correct = packed((each > 50.0) == metric.higher_is_better) if each is not None and is_share(each) else ""
    return Accuracy(value, metric.drop(before, value), agreement, samples, kind, before, interval, what, correct)


def packed(right: NDArray[np.bool_]) -> str:
    """Which images were classified correctly, one bit each, for `Accuracy.correct`."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(accuracy: Accuracy, metric: Metric = TOP1) -> NDArray[np.bool_] | None:
    """Which images were classified correctly (samples,); None where that was not kept. `metric`: what the accuracy is in.

    Raises:
        ValueError: it does not fit the other figures of the accuracy.
    """
    if not accuracy.correct:
        return None
    bits = np.frombuffer(base64.b64decode(accuracy.correct, validate=True), np.uint8)
    if len(bits) != -(-accuracy.samples // 8):
        raise ValueError(f"{8 * len(bits)} bits for {accuracy.samples} images")
    right = np.unpackbits(bits)[: accuracy.samples].astype(bool)
    counted = right if metric.higher_is_better else ~right  # a share of errors counts the wrong ones
    if abs(100.0 * counted.mean() - accuracy.value) > 1e-6:
        raise ValueError(f"{right.sum()} of {accuracy.samples} images are marked as correct, which is not {accuracy.value:.2f} %")
    return right


def drop_complaint(accuracy: Accuracy, limits: Allowed) -> str:
    """Why the accuracy gate is not passed, in a sentence; empty where it is."""
    if accuracy.drop <= limits.max_drop:
        return ""
    metric, kind = limits.metric, "" if accuracy.kind is Kind.MEASURED else f" ({accuracy.kind})"
    if metric.unit == "%":
        how, most = f"{accuracy.drop:.2f} points", f"{limits.max_drop:.3g}"
    else:
        how, most = metric.shown(accuracy.drop), metric.shown(limits.max_drop)
    fell = "fell" if metric.higher_is_better else "rose"
    return f"accuracy: {metric.name} {fell} by {how}{kind}, at most {most} allowed"


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
    limits: Allowed,
    accuracy: Accuracy,
    latency: Timing,
    *,
    size_bytes: int,
    masked: bool = False,
    seen: OnDevice | None = None,
) -> Verdict:
    """The verdict of all gates on an artifact; `seen` where its device is another machine than this one."""
    reasons = [drop_complaint(accuracy, limits)]
    if seen is not None and seen.agreement < SAME_CLASSES:
        reasons.append(
            f"device: on {seen.device} the artifact gives {100 * (1 - seen.agreement):.1f} % of {seen.samples} test images"
            f" another class than on this machine, at most {100 * (1 - SAME_CLASSES):g} % allowed"
            if limits.metric == TOP1
            else f"device: on {seen.device} the outputs for {seen.samples} test samples agree with this machine's by"
            f" {100 * seen.agreement:.1f} %, at least {100 * SAME_CLASSES:g} % is needed"
        )
    if limits.max_size is not None and size_bytes > limits.max_size:
        reasons.append(f"size: the file takes {size_bytes:,} bytes, at most {limits.max_size:,} allowed")
    reasons.append(speedup_complaint(latency, limits.min_speedup, masked=masked))
    failed = tuple(reason for reason in reasons if reason)
    return Verdict(not failed, failed)
