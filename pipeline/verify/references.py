"""The dense and the pruned PyTorch network on the test split, which artifacts are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import nn

from ...targets.base import FloatArray, Target
from ..files import atomic_write, file_ref
from ..run_context import RunContext
from ..run_folder import Stage
from ..task.inference import artifact_logits, logits, top1
from ..types import Accuracy, Artifact, Checkpoint, FileRef, Kind
from .gates import compare


@dataclass(frozen=True)
class References:
    """Accuracies and logits of the PyTorch networks."""

    dense_top1: float  # percent, test split
    pruned_top1: float
    dense_search_top1: float
    logits: FileRef  # safetensors: "dense" and "pruned", (N, classes) each, test split


def references_of(run: RunContext, before: Stage, checkpoint: Checkpoint, student: nn.Module) -> References:
    """The networks on the test split, which nothing was chosen on."""
    data, prep = run.loaded.data, run.loaded.subject.preprocess
    stage = run.folder.stage("test-split", "2", {}, (before.key, checkpoint.state.sha256))

    def ask() -> References:
        with run.stage("test split"):
            dense, pruned = (logits(m, data.test, prep, device=run.compute.device) for m in (run.loaded.module, student))
            search = logits(run.loaded.module, data.search, prep, device=run.compute.device)
            path = stage.folder / "logits.safetensors"
            atomic_write(path, save({"dense": dense, "pruned": pruned}))
        shares = (top1(dense, data.test.labels), top1(pruned, data.test.labels), top1(search, data.search.labels))
        return References(*shares, file_ref(path, run.folder.path))

    return stage.once(References, ask)


def accuracy_stage(run: RunContext, before: Stage, artifact: Artifact, references: References) -> Stage:
    """Where the accuracy of an artifact's file, computed on this machine, is kept."""
    inputs = (before.key, artifact.file.sha256, references.logits.sha256)
    return run.folder.stage(f"accuracy-{artifact.target}", "2", {}, inputs)


def accuracy_here(run: RunContext, target: Target, artifact: Artifact, references: References, kind: Kind) -> Accuracy:
    """Accuracy of the artifact on the whole test split, computed by its target's runner on this machine."""
    test, path = run.loaded.data.test, run.folder.path / artifact.file.path
    found = artifact_logits(target, path, test, run.loaded.subject.preprocess)
    return accuracy_of(run, found, np.arange(len(test)), references, kind)


def accuracy_of(run: RunContext, found: FloatArray, picked: NDArray[np.int64], references: References, kind: Kind) -> Accuracy:
    """Accuracy by logits (n, classes) for the test images at positions `picked`, beside the PyTorch networks' on the same."""
    known = load_file(run.folder.path / references.logits.path)
    pruned, dense = (known[name][picked] for name in ("pruned", "dense"))
    return compare(found, pruned, dense, run.loaded.data.test.labels[picked], kind)
