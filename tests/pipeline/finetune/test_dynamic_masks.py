"""Masks that move while a network trains: as many stay, the smallest go, the most wanted come back."""

from __future__ import annotations

import torch
from edge_compress.pipeline.finetune.dynamic_masks import drop_and_grow, dynamic
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


def test_the_smallest_go_and_the_most_wanted_come() -> None:
    weight = torch.tensor([3.0, -0.1, 2.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([1, 1, 1, 0, 0, 0])
    gradient = torch.tensor([9.0, 9.0, 9.0, 0.1, -5.0, 1.0])
    assert drop_and_grow(weight, mask, gradient, 0.4).tolist() == [True, False, True, False, True, False]
    assert drop_and_grow(weight, mask, gradient, 0.0).tolist() == [True, True, True, False, False, False]


@given(seed=st.integers(0, 10**6), kept=st.integers(0, 24), share=st.floats(0, 1))
@settings(deadline=None)
def test_as_many_connections_stay_whatever_the_share(seed: int, kept: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randn(4, 6, generator=generator) for _ in range(2))
    mask = torch.zeros(24)
    mask[torch.randperm(24, generator=generator)[:kept]] = 1
    found = drop_and_grow(weight * mask.view(4, 6), mask.view(4, 6), gradient, share)
    assert int(found.sum()) == kept
    moved = int((found & ~mask.view(4, 6).bool()).sum())
    assert moved == min(int(share * kept), 24 - kept)


def test_masks_move_early_and_rest_at_the_end_and_fixed_ones_never_move() -> None:
    teacher, student = network(), network()
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    start = {"3.weight": torch.rand(5, 144, generator=torch.Generator().manual_seed(2)) < 0.3}
    fixed = {"0.weight": torch.ones(4, 1, 3, 3)}
    with torch.no_grad():
        student[3].weight.mul_(start["3.weight"])
    before = {k: v.clone() for k, v in student.state_dict().items()}
    remask = dynamic(start, fixed, teacher, images, epochs=10)
    changed = []
    for epoch in (1, 5, 10):
        found = remask(epoch, student)
        assert found["0.weight"] is fixed["0.weight"]
        assert int(found["3.weight"].sum()) == int(start["3.weight"].sum())
        changed.append(int((found["3.weight"] & ~start["3.weight"]).sum()))
    assert changed[0] > changed[1] > changed[2] == 0
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items())  # it only looks
    assert torch.equal(remask(5, student)["3.weight"], dynamic(start, fixed, teacher, images, 10)(5, student)["3.weight"])
