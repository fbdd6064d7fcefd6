"""Golden samples: a few test samples with the artifact's own answers, so that anyone can check that a copy still gives the same.

Imports no torch: the answers are checked with the artifact's runtime and numpy alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...devices.local import describe
from ...devices.tensorrt.engines import Engines
from ...targets.base import Arrays, Target
from ..data.splits import network_inputs
from ..errors import EdgeCompressError, VerifyError
from ..types import Preprocess

SAMPLES = 16
SAME = 1e-5  # of the answers' range: what may differ where runtime and processor are the same
OTHER = 0.05  # where they are not: int8 kernels of other processors round differently
_NOTES = "golden"  # the one key of the file's notes: a file with several is not written in the same order every time


class AnyBatch(Protocol):
    """What golden samples are taken from, see `task.samples.Batch`."""

    @property
    def pixels(self) -> NDArray[np.uint8] | None:
        """Stored pixels (n, H, W, C), where there are any."""
        ...

    @property
    def arrays(self) -> Arrays:
        """Network inputs."""
        ...


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
    """Samples and answers."""

    inputs: tuple[NDArray[Any], ...]  # pixels (n, H, W, C) where there are mean and std, else network inputs
    outputs: tuple[NDArray[Any], ...]
    mean: tuple[float, ...]  # per channel, of pixels on [0, 1]; () for network inputs
    std: tuple[float, ...]
    where: Where  # the answers were taken

    def artifact_inputs(self, target: Target) -> Arrays:
        """What a target's artifacts take."""
        if self.mean and not target.takes_pixels:
            return network_inputs(self.inputs[0], Preprocess(self.mean, self.std, "none"))
        return self.inputs if len(self.inputs) > 1 else self.inputs[0]


def of_batch(batch: AnyBatch, outputs: tuple[NDArray[Any], ...], prep: Preprocess, at: Where) -> Golden:
    """Golden samples of a batch that an artifact answered."""
    if batch.pixels is not None:
        return Golden((batch.pixels,), outputs, prep.mean, prep.std, at)
    return Golden(as_tuple(batch.arrays), outputs, (), (), at)


def as_tuple(arrays: Arrays) -> tuple[NDArray[Any], ...]:
    """One array or several, as a tuple."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


@dataclass(frozen=True)
class Replay:
    """How an artifact's answers compare with those kept."""

    samples: int
    same_class: int | None  # of classifiers
    difference: float  # the largest between two elements of an output, as a share of the range of those kept
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
        how = "identical outputs" if self.difference == 0 else f"outputs differ by {self.difference:.2g} of their range"
        changed = self.kept_at.differing(self.here)
        why = f"not the same {' and '.join(changed)}" if changed else "same runtime and processor"
        runtime = " ".join(part for part in (self.here.runtime, self.here.version) if part)
        classes = "" if self.same_class is None else f", same class on {self.same_class} of {self.samples}"
        return f"{self.samples} golden samples in {runtime}: {how} (allowed {self.allowed:g}: {why}){classes}"


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
    named = {"inputs": golden.inputs, "outputs": golden.outputs}
    arrays = {f"{name}_{k}": np.ascontiguousarray(array) for name, each in named.items() for k, array in enumerate(each)}
    return bytes(save(arrays, metadata={_NOTES: json.dumps(notes, sort_keys=True)}))


def read(path: Path) -> Golden:
    """The samples and answers of a file.

    Raises:
        VerifyError: it is not such a file, or its parts do not fit one another.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            notes = json.loads((file.metadata() or {})[_NOTES])
            tensors = {name: np.asarray(file.get_tensor(name)) for name in sorted(file.keys())}
            inputs, outputs = (
                tuple(tensors[f"{part}_{k}"] for k in range(sum(name.startswith(f"{part}_") for name in tensors)))
                for part in ("inputs", "outputs")
            )
        mean, std = (tuple(float(value) for value in notes[name]) for name in ("mean", "std"))
        at = Where(**{name: str(value) for name, value in notes["where"].items()})
        lengths = {len(array) if array.ndim else 0 for array in (*inputs, *outputs)}
        if not inputs or not outputs or len(lengths) != 1 or any(array.size == 0 for array in (*inputs, *outputs)):
            raise ValueError(f"shapes {[a.shape for a in inputs]} and {[a.shape for a in outputs]}")
        channels = len(mean)
        pixels = channels == len(std) and len(inputs) == 1 and inputs[0].ndim == 4 and inputs[0].shape[-1] == channels
        if (mean or std) and not (pixels and inputs[0].dtype == np.uint8):
            raise ValueError(f"{channels} means and {len(std)} deviations for {inputs[0].dtype} of shape {inputs[0].shape}")
        within = all(abs(value) <= 1e6 for value in mean) and all(1e-6 <= value <= 1e6 for value in std)  # as --mean and --std
        if not within:
            raise ValueError(f"means {mean} and deviations {std}")
        if any(array.dtype.kind not in "fiub" for array in (*inputs, *outputs)):
            raise ValueError(f"types {[a.dtype.name for a in (*inputs, *outputs)]}")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise VerifyError(f"{path.name} holds no golden samples", found=str(error)) from error
    return Golden(inputs, outputs, mean, std, at)


def replay(golden: Golden, target: Target, artifact: Path) -> Replay:
    """The artifact's answers in its own runtime on this machine, compared with the recorded ones.

    Raises:
        UnavailableError: the runtime is not here.
        BuildError: the runtime refused the artifact.
    """
    with target.runner(artifact) as predict:
        outputs = as_tuple(predict(golden.artifact_inputs(target)))
    return compare(golden, outputs, where(target))


def compare(golden: Golden, outputs: tuple[NDArray[Any], ...], here: Where) -> Replay:
    """Answers to the same samples, given elsewhere or later, compared with the recorded ones."""
    allowed, count = OTHER if golden.where.differing(here) else SAME, len(golden.outputs[0])
    classes = len(golden.outputs) == 1 and golden.outputs[0].ndim == 2 and bool(golden.mean)
    if [o.shape for o in outputs] != [o.shape for o in golden.outputs]:
        return Replay(count, 0 if classes else None, float("inf"), allowed, golden.where, here)
    same = int((outputs[0].argmax(axis=1) == golden.outputs[0].argmax(axis=1)).sum()) if classes else None
    gaps = [_gap(found, kept) for found, kept in zip(outputs, golden.outputs, strict=True)]
    return Replay(count, same, max(gaps), allowed, golden.where, here)


def _gap(found: NDArray[Any], kept: NDArray[Any]) -> float:
    """The largest difference as a share of the range of what was kept."""
    spread = float(np.ptp(kept.astype(np.float64))) or 1.0
    if not np.isfinite(found.astype(np.float64)).all():
        return float("inf")
    return float(np.abs(found.astype(np.float64) - kept).max()) / spread
