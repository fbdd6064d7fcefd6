"""What makes later figures doubtful is said before the search: accuracy at chance, few test images, no logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.compute import Compute
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.task.load import load_subject
from edge_compress.pipeline.task.recipe import Recipe
from edge_compress.pipeline.task.samples import head
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


def notes_on(
    network: nn.Module, folder: Path, said: list[str], test_samples: int | None = None, accept_chance: bool = False
) -> list[str]:
    """What is noted on a network for the digits, by two calls."""
    config = Config(("x86",), out=folder, accept_chance=accept_chance)
    loaded = replace(load_subject(config), module=network)
    if test_samples is not None:
        loaded = replace(loaded, data=replace(loaded.data, test=head(loaded.data.test, test_samples)))
    for _ in range(2):
        with RunFolder(config, said.append) as opened:
            run: Any = SimpleNamespace(
                config=config, folder=opened, loaded=loaded, compute=Compute(), ui=SimpleNamespace(say=said.append)
            )
            sanity_check(run, "key")
            notes = opened.notes()
    return list(notes)


@pytest.fixture(scope="module")
def good() -> nn.Module:
    batch = load_subject(Config(("x86",))).data.train.batch(np.arange(1000))
    return fitted(batch.inputs, torch.as_tensor(batch.targets))


@pytest.mark.parametrize("permuted", [False, True], ids=["good", "classes in another order"])
def test_chance_is_said_once_and_is_in_the_report(good: nn.Module, permuted: bool, tmp_path: Path) -> None:
    said: list[str] = []
    network = nn.Sequential(good, Rolled()).eval() if permuted else good
    notes = notes_on(network, tmp_path / "run", said, accept_chance=True)
    assert sum(line.startswith("  dense network: ") for line in said) == 1
    assert [("which is chance for 10 classes" in note) for note in notes] == [True] * permuted


def test_a_dense_network_at_chance_is_refused_with_the_likely_causes(good: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"which is chance for 10 classes.*--class-order.*--accept-chance"):
        notes_on(nn.Sequential(good, Rolled()).eval(), tmp_path / "run", [])


@pytest.mark.parametrize(
    ("last", "told"), [(nn.Softmax(1), "are probabilities, not logits"), (nn.LogSoftmax(1), "are logarithms of probabilities")]
)
def test_outputs_that_are_no_logits_are_said(good: nn.Module, last: nn.Module, told: str, tmp_path: Path) -> None:
    (note,) = notes_on(nn.Sequential(good, last).eval(), tmp_path / "run", [])
    assert told in note


def test_a_test_split_too_small_to_conclude_from_is_said_with_its_interval(good: nn.Module, tmp_path: Path) -> None:
    (note,) = notes_on(good, tmp_path / "run", [], test_samples=20)
    assert note.startswith("The test split has 20 images: an accuracy on it is known to about 20 points either way")


class Error:
    """Mean squared error."""

    name, unit, higher_is_better = "MSE", "", False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.errors: list[float] = []

    def update(self, outputs: torch.Tensor, target: torch.Tensor) -> None:
        self.errors.append(float((outputs - target).square().mean()))

    def compute(self) -> float:
        return float(np.mean(self.errors))


@pytest.mark.parametrize("shifted", [False, True], ids=["good", "targets of other samples"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_recipe_whose_network_is_no_better_on_its_own_targets_than_on_others_is_noted(
    shifted: bool, labelled: bool, tmp_path: Path
) -> None:
    network = nn.Linear(4, 3).eval()
    inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    targets = network(inputs).detach().roll(int(shifted), 0)
    samples = torch.utils.data.TensorDataset(inputs, targets)
    metric = {"metric": Error} if labelled else {}
    recipe = Recipe(model=lambda: network, datasets=lambda: {"train": samples, "test": samples}, **metric)
    said: list[str] = []
    config = Config(("x86",), out=tmp_path / "run")
    with RunFolder(config, said.append) as opened:
        loaded = load_subject(config, recipe)
        run: Any = SimpleNamespace(
            config=config, folder=opened, loaded=loaded, compute=Compute(), ui=SimpleNamespace(say=said.append)
        )
        sanity_check(run, "key")
        notes = opened.notes()
    assert [("judged by the targets of other samples" in note) for note in notes] == [True] * (shifted and labelled)
    assert sum(line.startswith("  dense network: ") for line in said) == labelled
