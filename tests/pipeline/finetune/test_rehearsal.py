"""The learning rate that short trainings find: the highest that does no harm, and the weights stay as they were."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.finetune.rehearsal import FALLS, FEWEST, rehearsed
from edge_compress.pipeline.finetune.training import FinetuneSettings, finetune
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import Data, image_data
from edge_compress.pipeline.types import Preprocess
from torch import nn

LONG = FinetuneSettings(epochs=40, seed=0, learning_rate=1e-3, batch=32)


@pytest.fixture(scope="module")
def data() -> Data:
    return image_data(load_data("digits", seed=0), Preprocess((0.305,), (0.376,), "shift"))


@pytest.fixture(scope="module")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Without BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )
    how = replace(LONG, epochs=8, learning_rate=3e-3)
    finetune(net, None, data, Classification(), how, folder=tmp_path_factory.mktemp("trained"))
    return net.eval()


def test_a_rate_that_does_no_harm_is_kept_after_one_rehearsal(trained: nn.Module, data: Data) -> None:
    before = copy.deepcopy(trained.state_dict())
    found = rehearsed(trained, trained, data, Classification(), LONG)
    assert found.rate == LONG.learning_rate
    assert [rate for rate, _ in found.tried] == [LONG.learning_rate]
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_a_rate_that_undoes_what_the_network_knows_is_lowered_until_it_does_not(trained: nn.Module, data: Data) -> None:
    said: list[str] = []
    found = rehearsed(trained, trained, data, Classification(), replace(LONG, learning_rate=0.1), tell=said.append)
    assert found.before is not None
    assert found.before > 80
    assert found.tried[0][1] < 0.9 * found.before
    assert found.rate == found.tried[-1][0] < 0.1
    assert found.tried[-1][1] > 0.98 * found.before
    assert len(said) == len(found.tried)


def test_where_every_rate_harms_the_least_harmful_is_taken(trained: nn.Module, data: Data) -> None:
    found = rehearsed(trained, None, data, Classification(), replace(LONG, learning_rate=30.0))
    assert len(found.tried) == len(FALLS)
    assert found.rate == max(found.tried, key=lambda pair: pair[1])[0]


def test_a_short_training_is_not_rehearsed(trained: nn.Module, data: Data) -> None:
    steps = -(-len(data.train) // LONG.batch)
    short = replace(LONG, epochs=(3 * FEWEST - 1) // steps)
    assert rehearsed(trained, trained, data, Classification(), short).tried == ()


def test_zeros_of_masks_stay_in_a_rehearsal(trained: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_compress.pipeline.finetune import rehearsal

    seen: list[object] = []

    def watched(student: nn.Module, *args: object, folder: Path, masks: object, **more: object) -> object:
        seen.append(masks)
        return finetune(student, *args, folder=folder, masks=masks, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(rehearsal, "finetune", watched)
    masks = {"0.weight": torch.ones_like(trained.get_parameter("0.weight"), dtype=torch.uint8)}
    rehearsed(trained, trained, data, Classification(), LONG, masks=masks)
    assert seen == [masks]
