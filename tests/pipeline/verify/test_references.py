"""A dense classifier at chance-level accuracy triggers a warning before the search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.network.compute import Compute
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.task.load import load_subject
from edge_compress.pipeline.verify.references import sanity_check
from torch import nn


def fitted(inputs: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A linear classifier by least squares: right on most digits."""
    linear = nn.Linear(64, 10)
    columns = torch.cat([inputs.flatten(1), torch.ones(len(inputs), 1)], 1).double()
    found = (torch.linalg.pinv(columns) @ nn.functional.one_hot(labels, 10).double()).float()
    linear.weight.data, linear.bias.data = found[:-1].T.contiguous(), found[-1].contiguous()
    return nn.Sequential(nn.Flatten(), linear).eval()


class Rolled(nn.Module):
    """Its classes are one further."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.roll(1, 1)


@pytest.mark.parametrize("permuted", [False, True], ids=["good", "classes in another order"])
def test_chance_is_said_once_and_is_in_the_report(permuted: bool, tmp_path: Path) -> None:
    config = Config(("x86",), out=tmp_path / "run")
    loaded = load_subject(config)
    batch = loaded.data.train.batch(np.arange(1000))
    network = fitted(batch.inputs, torch.as_tensor(batch.targets))
    network = nn.Sequential(network, Rolled()).eval() if permuted else network
    loaded = replace(loaded, module=network)
    said: list[str] = []
    for _ in range(2):
        with RunFolder(config, said.append) as folder:
            run: Any = SimpleNamespace(folder=folder, loaded=loaded, compute=Compute(), ui=SimpleNamespace(say=said.append))
            sanity_check(run, "key")
            notes = folder.notes()
    assert sum(line.startswith("  dense network: ") for line in said) == 1
    assert [("which is chance for 10 classes" in note) for note in notes] == [True] * permuted
