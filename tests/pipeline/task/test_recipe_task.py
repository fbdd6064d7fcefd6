"""A recipe's metric, picture and network may be written in any way that PyTorch's users write them, and are judged rightly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.calling import call
from edge_compress.pipeline.task.recipe import Recipe
from edge_compress.pipeline.task.recipe_data import data_of
from edge_compress.pipeline.task.recipe_task import RecipeTask, open_recipe
from edge_compress.pipeline.task.task import judged, torch_predictor
from torch import Tensor, nn


class Mean:
    """The mean of all outputs."""

    name, unit, higher_is_better = "mean", "", True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def reset(self) -> None:
        self.seen = []

    def update(self, outputs: Any, target: Any) -> None:
        self.seen.append(outputs.float())

    def compute(self) -> float:
        return float(torch.cat(self.seen).mean())


class Few(nn.Module):
    """Some numbers of four."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, count)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class InPlace(Few):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(1.0).div_(2.0))


class Classes(Few):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class Seen(Few):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x)
        return scores, scores > 0


def recipe(model: Callable[[], nn.Module] = Few, **changed: Any) -> Recipe:
    generator = torch.Generator().manual_seed(1)
    samples = [(torch.randn(4, generator=generator), torch.tensor(k)) for k in range(20)]
    return Recipe(lambda: model().eval(), lambda: {"train": samples, "test": samples}, **changed)


def opened(found: Recipe) -> Any:
    data = data_of(found, 0)
    return (*open_recipe(found, data)[:2], data)


def task_of(**facts: Any) -> RecipeTask:
    task: RecipeTask = opened(recipe(metric=type("Odd", (Mean,), facts)))[1]
    return task


@pytest.mark.parametrize(
    ("higher", "dense", "falling"),
    [
        (False, 0.5, [0.4, 0.5, 0.6, 1.2, 40.0, 4000.0]),  # an error
        (False, 0.0, [0.0, 0.01, 1.0, 7.0]),  # a perfect network
        (False, -0.8, [-0.9, -0.8, -0.1, 0.0, 0.1, 0.2]),  # a correlation, negated
        (True, 0.9, [0.95, 0.9, 0.3, 1e-6, 0.0, -0.5, -3.0]),  # an R2
        (True, -0.5, [-0.4, -0.5, -2.0, -8.0]),  # a likelihood's logarithm
    ],
)
def test_a_worse_value_of_any_metric_is_a_smaller_share_so_that_searches_can_tell_candidates_apart(
    higher: bool, dense: float, falling: list[float]
) -> None:
    task = task_of(higher_is_better=higher)
    shares = [task.share(value, dense) for value in falling]
    assert all(one > other > 0.0 for one, other in itertools.pairwise(shares)), shares
    assert task.share(dense, dense) == 1.0
    assert task.share(math.nan, dense) == 0.0


def test_the_share_of_a_metric_that_rises_is_the_part_of_the_dense_value() -> None:
    assert [task_of().share(value, 80.0) for value in (96.0, 40.0, 0.8)] == pytest.approx([1.2, 0.5, 0.01])


def test_the_share_of_an_error_is_that_of_the_dense_error_in_it() -> None:
    assert task_of(higher_is_better=False).share(1.0, 0.25) == pytest.approx(0.25)


def test_a_metric_object_that_is_always_the_same_does_not_mix_two_judges() -> None:
    metric = Mean()
    network, task, data = opened(recipe(metric=lambda: metric))
    dense = judged(task, data.test, torch_predictor(network))
    worse = judged(task, data.test, lambda batch: (call(network, batch.inputs)[0].detach() - 5.0,))
    assert worse.value() == pytest.approx(dense.value() - 5.0, abs=1e-4)
    assert not metric.seen  # the user's own object


def test_a_metric_that_comes_with_something_in_it_begins_empty() -> None:
    def used() -> Mean:
        metric = Mean()
        metric.update(torch.full((50, 3), 1e6), None)
        return metric

    network, task, data = opened(recipe(metric=used))
    assert judged(task, data.test, torch_predictor(network)).value() < 10.0


def test_a_metric_that_works_in_place_changes_no_outputs_and_no_later_value() -> None:
    class Halving(Mean):
        def update(self, outputs: Tensor, target: Tensor) -> None:
            super().update(outputs.mul_(0.5) + target.mul_(2), target)

    network, task, data = opened(recipe(metric=Halving))
    batch = data.test.batch(np.arange(8))
    outputs = tuple(output.detach() for output in call(network, batch.inputs))
    before = outputs[0].clone()
    values = []
    for _ in range(2):  # as a search that keeps the dense outputs does
        judge = task.judge()
        judge.update(outputs, batch)
        values.append(judge.value())
    assert torch.equal(outputs[0], before)
    assert values[0] == values[1]
    assert judge.over(np.arange(8)) == judge.over(np.arange(8)) == pytest.approx(values[0])


def test_a_picture_that_draws_into_what_it_is_given_changes_nothing() -> None:
    def picture(inputs: Tensor, outputs: Tensor, target: Tensor) -> Any:
        for tensor in (inputs, outputs, target):
            tensor.zero_()
        return np.zeros((2, 2, 3), np.uint8)

    _, task, data = opened(recipe(picture=picture))
    batch, outputs = data.test.batch(np.array([3])), (torch.ones(1, 3),)
    task.picture(batch, outputs)
    assert batch.inputs.any()
    assert outputs[0].all()
    assert batch.targets.collated.tolist() == [3]


def test_a_picture_has_its_target_without_a_metric() -> None:
    seen: list[Any] = []

    def picture(inputs: Tensor, outputs: Tensor, target: Any) -> Any:
        seen.append(target)
        return np.zeros((2, 2, 3), np.uint8)

    for metric in (None, Mean):
        _, task, data = opened(recipe(picture=picture, metric=metric))
        task.picture(data.test.batch(np.array([3])), (torch.ones(1, 3),))
        assert seen[-1].tolist() == [3]


def test_a_network_that_normalises_its_input_in_place_is_not_taken_for_a_random_one() -> None:
    network, _, data = opened(recipe(InPlace))
    assert torch.equal(*(call(network, data.test.batch(np.arange(4)).inputs)[0] for _ in range(2)))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"model": Classes, "metric": Mean},
            "the outputs: found int64, expected a floating-point output; deploy scores, take argmax or a threshold in metric",
        ),
        ({"model": lambda: Few(1)}, r"the outputs: found one number for each sample and no metric\(\).*give a metric\(\)"),
        (
            {"metric": type("Odd", (Mean,), {"higher_is_better": None})},
            r"metric\(\).higher_is_better: found None, expected True or False; set higher_is_better",
        ),
    ],
)
def test_what_would_be_judged_wrongly_is_refused_when_the_recipe_is_read(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        opened(recipe(**changed))


def test_one_number_a_sample_is_taken_with_a_metric() -> None:
    network, task, data = opened(recipe(lambda: Few(1), metric=Mean))
    assert math.isfinite(judged(task, data.test, torch_predictor(network)).value())


def test_masks_beside_scores_reach_the_metric_as_masks() -> None:
    class Masked(Mean):
        def update(self, outputs: tuple[Tensor, Tensor], target: Tensor) -> None:
            assert outputs[1].dtype == torch.bool
            super().update(outputs[0][outputs[1]], target)

    network, task, data = opened(recipe(Seen, metric=Masked))
    assert judged(task, data.test, torch_predictor(network)).value() > 0
    network, task, data = opened(recipe(Seen))
    assert judged(task, data.test, torch_predictor(network), network).value() == pytest.approx(100.0)
    batch = data.train.batch(np.arange(8))
    outputs = tuple(output.detach() for output in call(network, batch.inputs))
    assert float(task.training_loss(outputs, batch.targets, outputs)) == 0.0
