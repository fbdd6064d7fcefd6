"""The embedded default network: it learns, it repeats itself, and it is built so that pruning can be seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.digits import MEAN, STD, DigitsResNet
from edge_compress.pipeline.data.splits import DataSet
from edge_compress.pipeline.finetune.digits import train_digits
from edge_compress.pipeline.network.weights import state_sha256
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.types import Epoch, Preprocess
from torch import nn

PREP = Preprocess(MEAN, STD, "shift")


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits", seed=0)


def part(data: DataSet, images: int) -> DataSet:
    return dataclasses.replace(data, train=data.train.head(images))


def test_mean_and_std_are_those_of_the_scans(digits: DataSet) -> None:
    pixels = digits.train.read(np.arange(len(digits.train))) / 255
    assert pixels.mean() == pytest.approx(MEAN[0], abs=0.005)
    assert pixels.std() == pytest.approx(STD[0], abs=0.005)


def test_training_learns_from_a_few_hundred_images(digits: DataSet) -> None:
    module = DigitsResNet()
    epochs: list[Epoch] = []
    train_digits(module, part(digits, 500), PREP, 0, epochs=4, progress=epochs.append)
    assert not module.training
    assert top1(logits(module, digits.test, PREP), digits.test.labels) > 70
    assert [e.epoch for e in epochs] == [1, 2, 3, 4]
    assert epochs[-1].loss < epochs[0].loss * 0.6
    assert epochs[-1].search_value == pytest.approx(top1(logits(module, digits.search, PREP), digits.search.labels))


def test_training_is_a_function_of_the_seed_and_not_of_what_came_before(digits: DataSet) -> None:
    small, digests = part(digits, 100), []
    process_state = torch.random.get_rng_state()
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        module = DigitsResNet()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(noise)
        before = torch.random.get_rng_state()
        train_digits(module, small, PREP, seed, epochs=1)
        assert torch.equal(torch.random.get_rng_state(), before)
        digests.append(state_sha256(module))
    torch.random.set_rng_state(process_state)
    assert digests[0] == digests[1] != digests[2]


def test_network_has_batchnorm_projections_and_enough_work_to_prune() -> None:
    module = DigitsResNet().eval()
    names = dict(module.named_modules())
    for block in ("layer1.0", "layer2.0", "layer3.0"):
        assert {f"{block}.{n}" for n in ("conv1", "bn1", "conv2", "bn2", "shortcut")} <= set(names)
    shortcuts = [n for n, m in names.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert shortcuts == ["layer2.0.shortcut.0", "layer3.0.shortcut.0"]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in names.values()) == sum(isinstance(m, nn.Conv2d) for m in names.values())
    work = []
    for m in names.values():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, x, y: work.append(m.weight.numel() * y.shape[2] * y.shape[3]))
    assert module(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert 5e6 < sum(work) < 6e7  # enough to prune, and little enough for a demo of minutes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_training_reaches_the_accuracy_the_demo_needs(seed: int) -> None:
    data, module = load_data("digits", seed=seed), DigitsResNet()
    train_digits(module, data, PREP, seed)
    assert top1(logits(module, data.test, PREP), data.test.labels) >= 97.5
