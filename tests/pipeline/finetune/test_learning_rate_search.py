"""The learning-rate search takes the highest rate whose trial ends as well as any; the network stays as it was."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.finetune import learning_rate_search
from edge_compress.pipeline.finetune.learning_rate_search import FEWEST, ROOM, search_learning_rate, steps_of
from edge_compress.pipeline.finetune.training import FinetuneSettings, finetune
from edge_compress.pipeline.signature import Metric
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import Data, image_data
from edge_compress.pipeline.task.task import Task
from edge_compress.pipeline.types import Epoch, Preprocess
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


def test_a_rate_that_undoes_what_the_network_knows_is_not_taken(
    trained: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_rate_search, "RATES", (0.1, 1e-3, 1e-4))
    before, said = copy.deepcopy(trained.state_dict()), list[str]()
    found = search_learning_rate(trained, trained, data, Classification(), LONG, tell=said.append)
    assert found.before is not None
    assert found.before > 80
    assert found.tried[0][1] < 0.9 * found.before
    assert found.rate < 0.1
    assert dict(found.tried)[found.rate] > 0.98 * found.before
    assert len(said) == len(found.tried)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("ends", "lower_is_better", "rate", "tries"),
    [
        ((95.0, 95.3, 95.2, 0, 0, 0), False, 3e-3, 3),  # as good as the best, and higher
        ((90.0, 95.0, 95.2, 95.1, 0, 0), False, 1e-3, 4),
        ((10.2, 10.0, 96.0, 95.0, 0, 0), False, 3e-4, 4),  # two that ruin the network tell nothing of the others
        ((math.nan, 95.0, 94.0, 0, 0, 0), False, 1e-3, 3),
        ((50.0, 80.0, 91.0, 94.0, 94.1, 94.0), False, 1e-4, 6),
        ((None, None, 91.0, 90.0, 0, 0), False, 3e-4, 4),  # None: it diverged
        ((None,) * 6, False, 1e-5, 6),
        ((2.0, 1.0, 1.2, 0, 0, 0), True, 1e-3, 3),
    ],
)
def test_the_highest_rate_is_taken_that_ends_as_well_as_any(
    trained: nn.Module,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    ends: tuple[float | None, ...],
    lower_is_better: bool,
    rate: float,
    tries: int,
) -> None:
    given = dict(zip(learning_rate_search.RATES, ends, strict=True))
    asked: list[float] = []

    def told(student: nn.Module, teacher: nn.Module, data: Data, task: Task, how: FinetuneSettings, **_: object) -> tuple[Epoch]:
        asked.append(how.learning_rate)
        end = given[how.learning_rate]
        if end is None:
            raise BuildError("fine-tuning diverged")
        return (Epoch(1, 0.0, end, 0.0),)

    monkeypatch.setattr(learning_rate_search, "finetune", told)
    task = Classification(metric=Metric("error", "", higher_is_better=False)) if lower_is_better else Classification()
    found = search_learning_rate(trained, trained, data, task, LONG)
    assert (found.rate, len(asked)) == (rate, tries)
    assert found.tried == tuple((r, end) for r, end in given.items() if r in asked and end is not None and end == end)


def test_a_short_training_is_not_search_learning_rate(trained: nn.Module, data: Data) -> None:
    steps = -(-len(data.train) // LONG.batch)
    short = replace(LONG, epochs=(ROOM * FEWEST - 1) // steps)
    assert steps_of(data, short) == 0
    assert steps_of(data, LONG) > 0


@pytest.mark.parametrize(
    ("whole", "steps"),
    [(799, 0), (800, 40), (811, 41), (2816, 141), (4000, 200), (9000, 200)],  # 5 % of 811 and of 2,816 is rounded up
)
def test_a_training_of_800_steps_has_a_search_whatever_5_per_cent_of_it_is_rounded_to(data: Data, whole: int, steps: int) -> None:
    one = replace(data, train=data.train.picked(np.arange(LONG.batch)))  # a step an epoch
    assert steps_of(one, replace(LONG, epochs=whole)) == steps


def test_zeros_of_masks_stay_in_a_trial(trained: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros: list[bool] = []

    def watched(student: nn.Module, *args: Any, **more: Any) -> tuple[Epoch, ...]:
        history = finetune(student, *args, **more)
        weight = student.get_parameter("0.weight")
        zeros.append(not weight[:8].any() and bool(weight[8:].all()))
        return history

    monkeypatch.setattr(learning_rate_search, "finetune", watched)
    monkeypatch.setattr(learning_rate_search, "RATES", (1e-3,))
    student = copy.deepcopy(trained)
    student.get_parameter("0.weight").data[:8] = 0.0
    masks = {"0.weight": (student.get_parameter("0.weight") != 0).to(torch.uint8)}
    search_learning_rate(student, trained, data, Classification(), LONG, masks=masks)
    assert zeros == [True]
