"""What only training shows about a recipe is found before the search."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.run.recipe_check import checked
from edge_compress.pipeline.task.recipe import Recipe
from edge_compress.pipeline.task.recipe_data import data_of
from edge_compress.pipeline.task.recipe_task import open_recipe
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.norm(self.layer(x)))


class Raising(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x, **{"targets": None} if self.training else {})


class Auxiliary(Net):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return (scores, scores) if self.training else scores


class Coarse(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[:, : 2 if self.training else 3]


def told(model: Callable[[], nn.Module], **changed: Any) -> list[str]:
    samples = [(torch.randn(4, generator=torch.Generator().manual_seed(k)), torch.tensor(k % 3)) for k in range(40)]
    recipe = Recipe(lambda: model().eval(), lambda: {"train": samples, "test": samples}, **changed)
    data = data_of(recipe, 0)
    network, task, signature, _ = open_recipe(recipe, data)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    try:
        return checked(network, task, signature, data)
    finally:
        drawn = random.random(), np.random.rand(), float(torch.rand(()))
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        assert drawn == (random.random(), np.random.rand(), float(torch.rand(())))
        assert not network.training
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


def _eval_only(outputs: Tensor, target: Tensor) -> Tensor:
    if outputs.requires_grad:
        raise RuntimeError("no gradients here")
    return outputs.mean()


@pytest.mark.parametrize(
    ("model", "changed", "says"),
    [
        (Raising, {}, r"model\(\).forward in train mode: found TypeError"),
        (Auxiliary, {}, r"model\(\).forward: found outputs of 16x3, 16x3 in train mode, 16x3 in eval mode, .*outputs\(\)"),
        (Coarse, {}, r"model\(\).forward: found outputs of 16x2 in train mode, 16x3 in eval mode"),
        (Net, {"loss": _eval_only}, r"loss\(\): found RuntimeError: no gradients here"),
    ],
)
def test_what_fails_in_training_alone_fails_before_the_search(model: Any, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        told(model, **changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [Net, lambda: Net().requires_grad_(False)])
def test_a_network_that_can_be_trained_is_left_as_it_was(model: Callable[[], nn.Module]) -> None:
    assert "samples: train 32" in " ".join(told(model))
