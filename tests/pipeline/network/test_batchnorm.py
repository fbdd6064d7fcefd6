from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from batchnorm_statistics import reestimate_on
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.preprocess import augmented, to_input
from edge_compress.pipeline.data.splits import DataSet, Split
from edge_compress.pipeline.network.batchnorm import input_moments, match_moments, pooled, statistics_match_data
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.types import Preprocess
from torch import nn

PREP = Preprocess((0.305,), (0.376,), "shift")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def reestimate(net: nn.Module, split: Split, prep: Preprocess, *, images: int = 2000, seed: int, batch: int = 250) -> None:
    """On the first images of a split, augmented, in batches of nearly one size."""
    count = min(images, len(split))
    generator = torch.Generator().manual_seed(seed)
    parts = np.array_split(np.arange(count), -(-count // batch)) if count else []
    reestimate_on(net, (augmented(split.read(part), prep, generator) for part in parts))


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load_data("digits", seed=0)


@pytest.fixture(scope="module")
def trained(data: DataSet) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10)),
        )
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        labels = torch.from_numpy(data.train.labels)
        for _ in range(100):
            chosen = torch.randint(0, len(data.train), (64,), generator=generator)
            loss = nn.functional.cross_entropy(net(augmented(data.train.read(chosen.numpy()), PREP, generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture
def net(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


def _accuracy(net: nn.Module, data: DataSet) -> float:
    return top1(logits(net, data.search, PREP), data.search.labels)


def _norms(net: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_ruined_statistics_are_found_again(net: nn.Module, data: DataSet) -> None:
    whole = _accuracy(net, data)
    for layer in _norms(net):
        layer.running_mean.add_(2.0)  # type: ignore[union-attr]
        layer.running_var.mul_(30.0)  # type: ignore[union-attr]
    ruined = _accuracy(net, data)
    reestimate(net, data.train, PREP, images=500, seed=0)
    assert whole > 85
    assert ruined < 50
    assert _accuracy(net, data) > whole - 3


def test_a_network_whose_weights_were_scaled_works_again(net: nn.Module, data: DataSet) -> None:
    whole = _accuracy(net, data)
    with torch.no_grad():
        net[0].weight.mul_(7.0)  # type: ignore[index, union-attr, operator]
        net[3].weight.mul_(0.1)  # type: ignore[index, union-attr, operator]
    scaled = _accuracy(net, data)
    reestimate(net, data.train, PREP, images=500, seed=0)
    assert scaled < whole - 20
    assert _accuracy(net, data) > whole - 3


def test_nothing_but_statistics_changes(net: nn.Module, data: DataSet) -> None:
    net.train()
    next(_norms(net)).momentum = 0.3
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    reestimate(net, data.train, PREP, images=300, seed=0)
    after = net.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == [k for k in before if k.endswith(STATISTICS)]
    assert [layer.momentum for layer in _norms(net)] == [0.3, 0.1]
    assert [m.training for m in net.modules()] == modes


def test_statistics_are_the_plain_average_over_augmented_batches(net: nn.Module, data: DataSet) -> None:
    reestimate(net, data.train, PREP, images=200, seed=5, batch=50)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        outputs = [
            net[0](augmented(data.train.read(np.arange(i, i + 50)), PREP, generator))  # type: ignore[index, operator]
            for i in range(0, 200, 50)
        ]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    var = torch.stack([o.transpose(0, 1).flatten(1).var(1) for o in outputs]).mean(0)
    layer = next(_norms(net))
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_bits_whatever_the_random_state(net: nn.Module, data: DataSet) -> None:
    others = [copy.deepcopy(net) for _ in range(2)]
    reestimate(net, data.train, PREP, images=300, seed=1)
    torch.rand(7)
    reestimate(others[0], data.train, PREP, images=300, seed=1)
    reestimate(others[1], data.train, PREP, images=300, seed=2)
    assert all(torch.equal(v, others[0].state_dict()[k]) for k, v in net.state_dict().items())
    assert not torch.equal(next(_norms(net)).running_mean, next(_norms(others[1])).running_mean)  # type: ignore[arg-type]


def test_more_images_than_there_are_means_all(net: nn.Module, data: DataSet) -> None:
    reestimate(net, data.train.head(130), PREP, images=2000, seed=0, batch=50)
    assert int(next(_norms(net)).num_batches_tracked) == 3  # type: ignore[arg-type]


def test_without_batchnorm_or_images_nothing_happens(net: nn.Module, data: DataSet) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    reestimate(net, data.train.head(0), PREP, seed=0)
    reestimate_on(net, [])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)).train()
    weights = {k: v.clone() for k, v in plain.state_dict().items()}
    reestimate(plain, data.train, PREP, seed=0)
    assert plain.training
    assert all(torch.equal(v, weights[k]) for k, v in plain.state_dict().items())


def test_modes_and_momenta_come_back_when_the_network_fails(net: nn.Module) -> None:
    net.train()
    with pytest.raises(RuntimeError):
        reestimate_on(net, [torch.zeros(4, 3, 8, 8)])
    assert all(m.training for m in net.modules())
    assert [layer.momentum for layer in _norms(net)] == [0.1, 0.1]


def test_ready_made_inputs_give_the_same_as_their_images(net: nn.Module, data: DataSet) -> None:
    other, plain = copy.deepcopy(net), Preprocess(PREP.mean, PREP.std, "none")
    reestimate(net, data.train, plain, images=100, seed=0, batch=50)
    reestimate_on(other, to_input(data.train.read(np.arange(100)), plain).split(50))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in net.state_dict().items())


def _folded(net: nn.Module) -> nn.Module:
    """The same function with every BatchNorm folded to mean 0 and variance 1, as converters and fusion leave it."""
    same = copy.deepcopy(net)
    modules = list(same.children())
    for layer, norm in itertools.pairwise(modules):
        if isinstance(norm, nn.BatchNorm2d):
            scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            layer.weight.data *= scale[:, None, None, None]
            norm.bias.data -= norm.running_mean * scale
            norm.weight.data.fill_((1.0 + norm.eps) ** 0.5)
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0)
    return same


@pytest.mark.parametrize("form", ["usual", "folded"])
def test_re_estimation_leaves_a_network_that_nothing_was_removed_from_as_it_was(form: str, net: nn.Module, data: DataSet) -> None:
    dense = net if form == "usual" else _folded(net)
    images = to_input(data.train.read(np.arange(128)), PREP)
    with torch.no_grad():
        before = dense(images)
        torch.testing.assert_close(before, net(images), rtol=1e-4, atol=1e-4)
    same = copy.deepcopy(dense)
    match_moments(same, input_moments(dense, images), images, {})
    with torch.no_grad():
        torch.testing.assert_close(same(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["usual", "folded"])
def test_re_estimation_recovers_a_network_whose_weights_were_scaled(form: str, net: nn.Module, data: DataSet) -> None:
    dense = net if form == "usual" else _folded(net)
    images = augmented(data.train.read(np.arange(500)), PREP, torch.Generator().manual_seed(1))
    hurt = copy.deepcopy(dense)
    with torch.no_grad():
        hurt[0].weight *= 0.05  # type: ignore[operator]
        hurt[3].weight *= 20.0  # type: ignore[operator]
    accuracy = _accuracy(dense, data)
    assert _accuracy(hurt, data) < accuracy - 5.0
    match_moments(hurt, input_moments(dense, images), images, {})
    assert _accuracy(hurt, data) > accuracy - 1.0


def test_moments_of_kept_channels_are_those_of_the_dense_network(net: nn.Module, data: DataSet) -> None:
    """The first layer keeps the odd channels; each must be matched to itself, not to the one that had its place."""
    images = to_input(data.train.read(np.arange(128)), PREP)
    stay = torch.arange(1, 16, 2)
    small = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        small[0].weight.copy_(net[0].weight[stay])  # type: ignore[operator, index]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(small[1], name).copy_(getattr(net[1], name)[stay])
        match_moments(small, input_moments(net, images), images, {"1": stay})
        torch.testing.assert_close(small(images), net[:2](images)[:, stay], rtol=1e-4, atol=1e-4)  # type: ignore[index]


class _Recurrent(nn.Module):
    """Runs its body, with a BatchNorm in it, three times; one more BatchNorm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.body(x)
        return self.fc(self.norm(x).relu().mean((2, 3)))


@pytest.fixture
def recurrent(data: DataSet) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Recurrent()
    reestimate(net, data.train, PREP, images=200, seed=0)
    return net.eval()


def test_moments_of_a_layer_that_runs_repeatedly_are_those_of_all_its_inputs(recurrent: nn.Module, data: DataSet) -> None:
    images, seen = to_input(data.train.read(np.arange(50)), PREP), []
    recurrent.body[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[index, operator]
    found_mean, found_var = pooled(input_moments(recurrent, images)["body.1"])
    var, mean = torch.var_mean(torch.cat(seen), (0, 2, 3), correction=0)
    torch.testing.assert_close(found_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_var, var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_re_estimation_leaves_a_network_as_it_was_that_runs_a_batchnorm_repeatedly(
    shift: float, recurrent: nn.Module, data: DataSet
) -> None:
    for norm in _norms(recurrent):
        norm.running_mean.add_(shift)  # type: ignore[union-attr]  # not the statistics of these data
    images, same = to_input(data.train.read(np.arange(128)), PREP), copy.deepcopy(recurrent)
    match_moments(same, input_moments(recurrent, images), images, {})
    with torch.no_grad():
        torch.testing.assert_close(same(images), recurrent(images), rtol=1e-4, atol=1e-4)


def test_re_estimation_recovers_a_layer_before_a_batchnorm_that_runs_repeatedly(recurrent: nn.Module, data: DataSet) -> None:
    images, hurt = to_input(data.train.read(np.arange(128)), PREP), copy.deepcopy(recurrent)
    with torch.no_grad():
        hurt.body[0].weight.mul_(0.05)  # type: ignore[index, union-attr]
        hurt.body[0].bias.mul_(0.05)  # type: ignore[index, union-attr]
        expected = recurrent(images)
        before = (hurt(images) - expected).norm()
        match_moments(hurt, input_moments(recurrent, images), images, {})
        assert (hurt(images) - expected).norm() < 0.2 * before


def test_statistics_that_are_not_the_datas_are_told_apart(net: nn.Module, data: DataSet) -> None:
    images = augmented(data.train.read(np.arange(128)), PREP, torch.Generator().manual_seed(1))
    assert statistics_match_data(net, images)
    assert statistics_match_data(_folded(net), images)  # its factors were near 1, as right after training began
    for norm in _norms(net):
        norm.weight.data.mul_(torch.linspace(2.0, 8.0, len(norm.weight)))
    assert not statistics_match_data(_folded(net), images)
    assert statistics_match_data(nn.Sequential(nn.Conv2d(1, 4, 3)).eval(), images)  # no BatchNorm
