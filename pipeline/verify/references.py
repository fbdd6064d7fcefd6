"""What artifacts are compared with: the dense and the pruned PyTorch network on the test split, kept for runs that go on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import nn

from ..files import atomic_write, file_ref
from ..run_context import Run
from ..run_folder import Stage
from ..task.inference import logits, top1
from ..types import Checkpoint, FileRef


@dataclass(frozen=True)
class References:
    """Accuracies and logits of the PyTorch networks."""

    dense_top1: float  # percent, test split
    pruned_top1: float
    dense_search_top1: float
    logits: FileRef  # safetensors: "dense" and "pruned", (N, classes) each, test split


def references_of(run: Run, before: Stage, checkpoint: Checkpoint, student: nn.Module) -> References:
    """The networks on the test split, which nothing was chosen on."""
    data, prep = run.loaded.data, run.loaded.subject.preprocess
    stage = run.folder.stage("test-split", "1", {"device": run.device}, (before.key, checkpoint.state.sha256))
    references = stage.result(References)
    if references is None:
        with run.stage("test split"):
            dense, pruned = (logits(m, data.test, prep, device=run.device) for m in (run.loaded.module, student))
            search = logits(run.loaded.module, data.search, prep, device=run.device)
            path = stage.folder / "logits.safetensors"
            atomic_write(path, save({"dense": torch.from_numpy(dense), "pruned": torch.from_numpy(pruned)}))
        references = References(
            top1(dense, data.test.labels),
            top1(pruned, data.test.labels),
            top1(search, data.search.labels),
            file_ref(path, run.folder.path),
        )
        stage.finish(references)
    return references
