"""What goes through a network at once keeps to a bound on memory, and comes out the same."""

from __future__ import annotations

import resource

import nets
import pytest
import torch
from edge_compress.pipeline.network.compute import CPU, Compute
from edge_compress.pipeline.network.memory import (
    TensorCache,
    backward_batch_size,
    inference_batch_size,
    micro_batch_size,
    saved_activation_bytes,
)
from torch import nn


def test_bytes_are_those_of_the_activations_and_grow_with_the_samples() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.Sigmoid())
    x = torch.randn(1, 3, 16, 16)
    expected = 4 * 16 * 16 * (3 + 8 + 4)  # the first input, what ReLU gives, what sigmoid gives
    assert saved_activation_bytes(net, x) == expected
    assert saved_activation_bytes(net, x.expand(4, -1, -1, -1)) == 4 * expected


@pytest.mark.parametrize("name", ["OptionA", "Mobile"])
def test_the_measure_changes_nothing_in_the_network(name: str) -> None:
    net = nets.drawn(getattr(nets, name))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    saved_activation_bytes(net, torch.randn(1, *nets.SHAPE))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_less_memory_means_fewer_samples_and_at_least_one() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(2, 3, 64, 64)
    found = [backward_batch_size(net, x, Compute(memory_bytes=size), 100) for size in (1 << 40, 1 << 28, 1 << 24, 1)]
    assert found[0] == 100
    assert found == sorted(found, reverse=True)
    assert found[-1] == 1
    assert found[1] * 2 * saved_activation_bytes(net, x[:1]) <= 1 << 26
    assert inference_batch_size(3 * 32 * 32, 250) == 250
    assert inference_batch_size(3 * 224 * 224, 250) == 27
    assert inference_batch_size(10**9, 250) == 1


def test_a_training_step_is_taken_in_parts_where_its_activations_do_not_fit() -> None:
    net, sample = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval(), torch.zeros(1, 3, 8, 8)
    each = 2 * saved_activation_bytes(net, sample)
    assert micro_batch_size(net, sample, 32, 32 * each) is None
    assert micro_batch_size(net, sample, 32, 32 * each - 1) == 16
    assert micro_batch_size(net, sample, 32, 9 * each) == 8
    assert micro_batch_size(net, sample, 32, each) == 4  # BatchNorm needs a few


def test_the_removal_curvature_of_large_images_stays_within_the_bound() -> None:
    net = nn.Sequential(*(layer for _ in range(40) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()))).eval()
    images = torch.randn(100, 3, 256, 256)
    each = saved_activation_bytes(net, images[:1])
    count = backward_batch_size(net, images, CPU, 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for part in images.split(count)[:3]:
        net(part).sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 1.5e9 < 100 * each  # all at once would have taken more


def test_a_cache_keeps_to_its_bound_and_drops_what_was_not_used_for_longest() -> None:
    computed: list[str] = []
    cache: TensorCache[str, tuple[torch.Tensor, ...]] = TensorCache(3 * 40)

    def get(name: str) -> torch.Tensor:
        return cache.get(name, lambda: (computed.append(name) or torch.full((10,), float(len(computed))),))[0]

    first = get("a")
    for name in "bc":
        get(name)
    assert torch.equal(get("a"), first)
    get("d")  # b is the one that goes
    for name in "cad":
        get(name)
    assert computed == [*"abcd"]
    get("b")
    assert computed == [*"abcdb"]


def test_a_result_larger_than_the_bound_is_kept_until_the_next() -> None:
    cache: TensorCache[int, tuple[torch.Tensor, ...]] = TensorCache(10)
    large = torch.zeros(100)
    assert cache.get(0, lambda: (large,))[0] is large
    assert cache.get(0, lambda: (torch.ones(100),))[0] is large
    cache.get(1, lambda: (torch.ones(1),))
    assert cache.get(0, lambda: (torch.ones(100),))[0] is not large
