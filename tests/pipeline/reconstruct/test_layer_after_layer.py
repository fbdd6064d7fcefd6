"""Sequential reconstruction of convolutional networks: errors do not pile up, and blocks that stay repair what others did."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import nets
import pytest
import torch
from batchnorm_statistics import reestimate_on
from edge_compress.pipeline.axes.coupling import Plan as Gone
from edge_compress.pipeline.axes.cutting.gate import Checked
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.axes.program import Program
from edge_compress.pipeline.reconstruct.sequential import sequential
from edge_compress.pipeline.reconstruct.stitching import Fitter, stitched
from edge_compress.pipeline.score.layer_moments import LayerMoments
from torch import nn


def fractions(found: Checked, share: float, blocks: Sequence[str] = ()) -> Gone:
    gone = {g: range(max(1, int(len(u) * share)), len(u)) for g, u in nets.units(found.coupling).items()}
    return {g: k for g, k in gone.items() if k} | dict.fromkeys(blocks, range(1))


def names_of_blocks(found: Checked) -> list[str]:
    return [block.name for block in found.coupling.blocks]


def cut_of(found: Checked, plan: Gone) -> nn.Module:
    return cut(found.coupling, plan, found.sized).eval()


def solved_of(found: Checked, plan: Gone, inputs: torch.Tensor, **how: Any) -> nn.Module:
    return sequential(found.coupling, plan, found.sized, inputs, **how)


class Plain(nn.Module):
    """No BatchNorm; some layers have a bias, others none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, padding=1), nets.conv(16, 16, stride=2)
        self.c, self.d, self.fc = nn.Conv2d(16, 24, 3, padding=1), nets.conv(24, 24), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.fc(torch.relu(self.d(torch.relu(self.c(x)))).mean((2, 3)))


TRAINED = {
    "padded shortcuts": lambda: nets.OptionA(1, 10, (8, 16, 24)),
    "projections": lambda: nets.Projection(1, 10, (12, 20)),
    "pre-activation": lambda: nets.PreActivation(1, 10, (12, 20)),
    "no BatchNorm": Plain,
}


@functools.cache
def on_digits(name: str) -> Checked:
    return nets.checked_of(nets.trained(TRAINED[name]), (1, 8, 8))


def stitched_of(found: Checked, plan: Gone, inputs: torch.Tensor) -> nn.Module:
    net = found.coupling.walk.captured.module
    small = stitched(found.coupling, plan, found.sized, Fitter(LayerMoments(net, inputs))).eval()
    reestimate_on(small, [inputs])
    return small


@pytest.mark.parametrize("name", TRAINED)
def test_layer_after_layer_keeps_more_accuracy_than_stitching_and_cutting(name):
    found = on_digits(name)
    inputs = nets.digits()[0][:500]
    plan = fractions(found, 0.4)
    small = cut_of(found, plan)
    reestimate_on(small, [inputs])
    plain, patched = nets.accuracy(small), nets.accuracy(stitched_of(found, plan, inputs))
    solved = nets.accuracy(solved_of(found, plan, inputs))
    assert nets.accuracy(found.coupling.walk.captured.module) > 0.85
    assert solved > plain + 0.2
    assert solved > patched + 0.02


@pytest.mark.parametrize("name", ["padded shortcuts", "projections", "pre-activation"])
def test_what_removed_blocks_did_is_taken_over_by_those_that_stay(name):
    found = on_digits(name)
    inputs = nets.digits()[0][:500]
    blocks = names_of_blocks(found)[1::2]
    assert blocks
    plan = fractions(found, 0.75, blocks)
    plain = cut_of(found, plan)
    reestimate_on(plain, [inputs])
    small = solved_of(found, plan, inputs)
    assert nets.accuracy(small) > nets.accuracy(plain) + 0.2
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert not any(m.training for m in small.modules())


def read_by(net: nn.Module, layers: tuple[str, ...], inputs: torch.Tensor) -> list[torch.Tensor]:
    """What these layers read when the network runs."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        net.get_submodule(n).register_forward_hook(lambda m, args, out, n=n: seen.__setitem__(n, args[0].clone())) for n in layers
    ]
    with torch.no_grad():
        net(inputs)
    for hook in hooks:
        hook.remove()
    return [seen[n] for n in layers]


@pytest.mark.parametrize(
    ("name", "block", "layers"),
    [
        ("projections", "block:layer1.0.conv2", ("layer1.1.conv1", "layer2.0.conv1")),
        ("padded shortcuts", "block:layer2.0.conv2", ("layer2.1.conv1", "layer3.0.conv1")),
    ],
)
def test_the_next_block_repairs_what_its_stream_lost(name, block, layers):
    """Solved for the stream, a block halves the error a removed block left; solved for its own output, it takes off a quarter."""
    found = on_digits(name)
    net, inputs = found.coupling.walk.captured.module, nets.digits()[0][:500]
    small = solved_of(found, {block: range(1)}, inputs)
    before, after = (
        float((mine - wanted).norm() / wanted.norm())
        for wanted, mine in zip(read_by(net, layers, inputs), read_by(small, layers, inputs), strict=True)
    )
    assert before > 0.3
    assert after < 0.63 * before


@pytest.mark.parametrize("name", nets.NETS)
def test_a_plan_that_removes_nothing_gives_the_dense_function(name):
    net, same = nets.subject(name)[0], solved_of(nets.checked(name), {}, nets.images(8))
    with torch.no_grad():
        expected, found = net(nets.images(seed=5)), same(nets.images(seed=5))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.parametrize("name", nets.NETS)
def test_every_kind_of_network_can_be_solved(name):
    """Cut by a quarter, blocks out, layers re-solved: the answers are nearer to the dense network's than without solving."""
    net, found = nets.subject(name)[0], nets.checked(name)
    plan, inputs = fractions(found, 0.75, names_of_blocks(found)[1::2]), nets.images(200)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small = solved_of(found, plan, inputs)
    with torch.no_grad():
        wanted, plain, solved = (n(inputs) for n in (net, cut_of(found, plan), small))
    assert float((solved - wanted).norm()) < 0.9 * float((plain - wanted).norm())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_solving_again_gives_the_same_bits():
    found = on_digits("projections")
    plan, inputs = fractions(found, 0.5), nets.digits()[0][:120]
    first, second = (solved_of(found, plan, inputs).state_dict() for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_one_program_of_the_dense_network_serves_every_plan():
    found = on_digits("projections")
    inputs = nets.digits()[0][:120]
    dense = Program.of(found.coupling.walk.captured.module, inputs)
    for share in (0.5, 0.25):
        plan = fractions(found, share)
        alone, shared = (solved_of(found, plan, inputs, dense=d).state_dict() for d in (None, dense))
        assert all(torch.equal(v, shared[k]) for k, v in alone.items())


def test_progress_rises_to_the_end():
    found = nets.checked("OptionA")
    seen: list[float] = []
    solved_of(found, fractions(found, 0.5), nets.images(8), progress=seen.append)
    assert seen == sorted(seen)
    assert 0.0 < seen[0] < 0.1
    assert 0.9 < seen[-1] <= 1.0
    assert len(seen) > 20


class Deep(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nets.conv(3, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(*[nets.ProjectedBlock(4, 4) for _ in range(blocks)])
        self.fc = nn.Linear(4, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def most_alive(blocks: int, removed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest number of the dense network's activations that were alive at once."""
    found = nets.checked_of(nets.drawn(lambda: Deep(blocks)))
    dense = found.coupling.walk.captured.module
    held: list[weakref.ref[torch.Tensor]] = []
    alive = []
    real = Program.evaluate

    def evaluate(self: Program, node: torch.fx.Node) -> Any:
        value = real(self, node)
        if self.module is dense and node.op == "call_function":
            held.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Program, "evaluate", evaluate)
    plan = {"stem.0": [2]} | dict.fromkeys(names_of_blocks(found)[1 : 1 + removed], range(1))
    solved_of(found, plan, nets.images(4), progress=lambda _: alive.append(sum(r() is not None for r in held)))
    monkeypatch.undo()
    gc.collect()
    assert len(held) > 3 * blocks  # every one was computed
    return max(alive)


def test_dense_activations_are_freed_as_the_walk_goes_on(monkeypatch):
    shallow, deep = most_alive(3, 0, monkeypatch), most_alive(12, 0, monkeypatch)
    assert deep == shallow
    assert deep <= 10
    assert most_alive(12, 2, monkeypatch) <= 20


class SamePadding(nn.Module):
    """Convolutions that pad by a word, and a filter that was pruned before: all its weights are zero, its bias is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.c, self.fc = nn.Conv2d(8, 8, 3, padding="valid"), nn.Linear(8, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


def test_convolutions_that_pad_by_a_word_are_re_fit_and_dead_filters_keep_their_bias() -> None:
    module = nets.drawn(SamePadding)
    with torch.no_grad():
        module.b.weight[2], module.b.bias[2] = 0.0, 2.5
    found = nets.checked_of(module)
    assert {layer.weight for layer in Program.of(module, nets.images(2)).layers()} == {
        f"{n}.weight" for n in ("a", "b", "c", "fc")
    }
    plan, inputs = {"a": range(4, 8)}, nets.images(200)
    small, plain = solved_of(found, plan, inputs), cut_of(found, plan)
    with torch.no_grad():
        wanted = module(inputs)
        errors = [float((net(inputs) - wanted).norm()) for net in (small, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert float(small.get_parameter("b.bias")[2].detach()) == pytest.approx(2.5, abs=0.1)
