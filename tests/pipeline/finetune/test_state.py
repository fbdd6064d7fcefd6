"""Frozen parameters: a network that is frozen as a whole is trained, one that is frozen in part stays so."""

from __future__ import annotations

from pathlib import Path

import torch
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.finetune.state import thawed
from edge_compress.pipeline.finetune.training import FinetuneSettings, finetune
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import head, image_data
from edge_compress.pipeline.types import Preprocess
from torch import nn


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()


def _trained(net: nn.Module, folder: Path) -> tuple[set[str], list[str]]:
    """Names of the parameters that training changed, and what it noted."""
    data = image_data(load_data("digits", seed=0), Preprocess((0.3,), (0.4,), "shift"))
    few = type(data)(head(data.train, 64), head(data.search, 20), data.test)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    noted: list[str] = []
    settings = FinetuneSettings(epochs=1, seed=0, learning_rate=1e-2, batch=32)
    finetune(net, None, few, Classification(), settings, folder=folder, note=noted.append, untrained=-1.0)
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}, noted


def test_a_network_that_came_frozen_is_fine_tuned_and_a_note_says_so(tmp_path: Path) -> None:
    changed, noted = _trained(_net().requires_grad_(False), tmp_path)
    assert changed == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert noted == ["The network came with all its parameters frozen (requires_grad); fine-tuning trained all of them."]


def test_parameters_that_the_user_froze_stay_as_they_are_and_are_counted(tmp_path: Path) -> None:
    net = _net()
    net[0].requires_grad_(False)
    changed, noted = _trained(net, tmp_path)
    assert changed == {"3.weight", "3.bias"}
    assert noted == ["2 of the network's 4 parameters are frozen (requires_grad) and were not fine-tuned."]


def test_a_network_with_nothing_frozen_needs_no_note() -> None:
    assert thawed(nn.Linear(2, 2)) == ""
    assert thawed(nn.ReLU()) == ""
