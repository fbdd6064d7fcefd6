"""Golden samples: a few test images with the artifact's own answers, so that anyone can check that a copy still gives the same.

Imports no torch: the answers are checked with the artifact's runtime and numpy alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...devices.local import describe
from ...devices.tensorrt.engines import Engines
from ...targets.base import Target
from ..errors import EdgeCompressError, VerifyError
from ..task.splits import artifact_images
from ..types import Preprocess

FloatArray = NDArray[np.float32]

IMAGES = 16
SAME = 1e-5  # of the answers' range: what may differ where runtime and processor are the same
OTHER = 0.05  # where they are not: int8 kernels of other processors round differently
_NOTES = "golden"  # the one key of the file's notes: a file with several is not written in the same order every time


@dataclass(frozen=True)
class Where:
    """What answers depend on besides the artifact; empty where it is not known."""

    runtime: str
    version: str
    cpu: str

    def differing(self, other: Where) -> list[str]:
        """Names of what is not known to be the same in both."""
        parts = {"runtime": (self.runtime, other.runtime), "runtime version": (self.version, other.version)}
        parts["processor"] = (self.cpu, other.cpu)
        return [name for name, (one, another) in parts.items() if one != another or not one]


@dataclass(frozen=True, eq=False)
class Golden:
    """Images and answers."""

    pixels: NDArray[np.uint8]  # (n, H, W, C)
    labels: NDArray[np.int64]  # (n,)
    logits: FloatArray  # (n, classes)
    mean: tuple[float, ...]  # per channel, of pixels on [0, 1]
    std: tuple[float, ...]
    where: Where  # the answers were taken

    @property
    def preprocess(self) -> Preprocess:
        """From these pixels to network inputs."""
        return Preprocess(self.mean, self.std, "none")


@dataclass(frozen=True)
class Replay:
    """How an artifact's answers compare with those kept."""

    images: int
    same_class: int
    difference: float  # the largest between two logits, as a share of the range of those kept
    allowed: float
    kept_at: Where
    here: Where

    @property
    def holds(self) -> bool:
        """Whether they are the same answers, up to what may differ."""
        return self.difference <= self.allowed

    @property
    def text(self) -> str:
        """The comparison in one sentence."""
        how = "identical logits" if self.difference == 0 else f"logits differ by {self.difference:.2g} of their range"
        changed = self.kept_at.differing(self.here)
        why = f"not the same {' and '.join(changed)}" if changed else "same runtime and processor"
        runtime = " ".join(part for part in (self.here.runtime, self.here.version) if part)
        return (
            f"{self.images} golden images in {runtime}: {how} (allowed {self.allowed:g}: {why}), "
            f"same class on {self.same_class} of {self.images}"
        )


def where(target: Target) -> Where:
    """What a target's answers depend on, on this machine."""
    try:
        machine = describe(target.runtime)
    except EdgeCompressError:  # a runtime that is not measured on this machine: its answers count nevertheless
        machine = {}
    return Where(target.runtime, machine.get("runtime_version", ""), machine.get("cpu", ""))


def where_on(engines: Engines) -> Where:
    """What an engine's answers depend on, on its board."""
    machine = engines.agent.hello()["machine"]
    return Where("tensorrt", f"tensorrt {engines.version}", str(machine["board"] or machine["cpu"]))


def to_bytes(golden: Golden) -> bytes:
    """The safetensors file."""
    notes = {"mean": golden.mean, "std": golden.std, "where": asdict(golden.where)}
    tensors = {"pixels": golden.pixels, "labels": golden.labels, "logits": golden.logits}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return bytes(save(arrays, metadata={_NOTES: json.dumps(notes, sort_keys=True)}))


def read(path: Path) -> Golden:
    """The images and answers of a file.

    Raises:
        VerifyError: it is not such a file, or its parts do not fit one another.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            notes = json.loads((file.metadata() or {})[_NOTES])
            pixels, labels, logits = (np.asarray(file.get_tensor(name)) for name in ("pixels", "labels", "logits"))
        mean, std = (tuple(float(value) for value in notes[name]) for name in ("mean", "std"))
        at = Where(**{name: str(value) for name, value in notes["where"].items()})
        shapes = (pixels.ndim, labels.shape, logits.ndim, len(logits), len(mean), len(std))
        if shapes != (4, (len(pixels),), 2, len(pixels), pixels.shape[-1], pixels.shape[-1]) or not len(pixels):
            raise ValueError(f"shapes {pixels.shape}, {labels.shape}, {logits.shape}")
        if [array.dtype.name for array in (pixels, labels, logits)] != ["uint8", "int64", "float32"]:
            raise ValueError(f"types {pixels.dtype}, {labels.dtype}, {logits.dtype}")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerifyError(f"{path.name} holds no golden images", found=str(error)) from error
    return Golden(pixels, labels, logits, mean, std, at)


def replay(golden: Golden, target: Target, artifact: Path) -> Replay:
    """The artifact's answers in its own runtime on this machine, compared with the recorded ones.

    Raises:
        UnavailableError: the runtime is not here.
        BuildError: the runtime refused the artifact.
    """
    with target.runner(artifact) as predict:
        logits = predict(artifact_images(target, golden.pixels, golden.preprocess))
    return compare(golden, logits, where(target))


def compare(golden: Golden, logits: FloatArray, here: Where) -> Replay:
    """Answers (n, classes) to the same images, given elsewhere or later, compared with the recorded ones."""
    allowed = OTHER if golden.where.differing(here) else SAME
    if logits.shape != golden.logits.shape:
        return Replay(len(golden.logits), 0, float("inf"), allowed, golden.where, here)
    same = int((logits.argmax(axis=1) == golden.logits.argmax(axis=1)).sum())
    spread = float(np.ptp(golden.logits)) or 1.0
    gap = np.abs(logits.astype(np.float64) - golden.logits)
    difference = float(gap.max()) / spread if np.isfinite(logits).all() else float("inf")
    return Replay(len(golden.logits), same, difference, allowed, golden.where, here)
