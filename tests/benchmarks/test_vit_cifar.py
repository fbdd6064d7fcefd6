"""The compact transformer's training: its optimizer, and that a stopped run ends as one that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vit_cifar
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

TEACHER = """
import torch

def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 10))
"""


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_an_update_has_singular_values_near_one_and_the_gradients_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = vit_cifar.orthogonalised(matrix)
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert float((found * (u @ v)).sum() / (found.norm() * (u @ v).norm())) > 0.97


def test_muon_takes_the_same_step_whatever_the_gradients_length() -> None:
    steps = []
    for scale in (1.0, 100.0):
        weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
        weight.grad = scale * torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        vit_cifar.Muon([weight], rate=0.1, decay=0.0).step()
        steps.append(weight.detach())
    torch.testing.assert_close(steps[0], steps[1])
    # the root mean square of Adam's steps: 0.2 of the rate, see Muon
    assert float(steps[0].square().mean().sqrt()) == pytest.approx(0.02, rel=0.3)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training of two epochs on 40 images, 8 more held out."""
    draw = np.random.default_rng(0)
    splits = {f"{name}_images": draw.integers(0, 256, (n, 32, 32, 3), np.uint8) for name, n in (("train", 48), ("test", 8))}
    splits |= {f"{name}_labels": draw.integers(0, 10, n) for name, n in (("train", 48), ("test", 8))}
    np.savez(tmp_path / "cifar.npz", **splits)
    (tmp_path / "teacher.py").write_text(TEACHER)
    scope: dict[str, Any] = {}
    exec(TEACHER, scope)
    torch.save(scope["small"]().state_dict(), tmp_path / "teacher.pt")
    monkeypatch.setattr(vit_cifar, "BATCH", 8)
    files = {"data": "cifar.npz", "teacher-weights": "teacher.pt"}
    given = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
    return [*given, "--teacher", f"{tmp_path / 'teacher.py'}:small", "--epochs", "2", "--held-out", "8"]


def trained(arguments: list[str], folder: Path) -> dict[str, torch.Tensor]:
    out = folder / "net.safetensors"
    found = CliRunner().invoke(vit_cifar.main, [*arguments, "--work", str(folder), "--out", str(out)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return load_file(out)


def test_a_training_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(arguments, tmp_path / "whole")
    judged = vit_cifar.top1

    def stopped(*_: object) -> float:
        monkeypatch.setattr(vit_cifar, "top1", killed)
        return judged(*_)  # type: ignore[arg-type]

    def killed(*_: object) -> float:
        raise RuntimeError("killed in the second epoch")

    monkeypatch.setattr(vit_cifar, "top1", stopped)
    with pytest.raises(RuntimeError, match="killed"):
        trained(arguments, tmp_path / "stopped")
    monkeypatch.setattr(vit_cifar, "top1", judged)
    resumed = trained(arguments, tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    log = (tmp_path / "stopped" / "net.log").read_text().splitlines()
    assert [line.split(":")[0] for line in log] == ["epoch 1", "epoch 2", "top-1 on the test split after 2 epochs"]
