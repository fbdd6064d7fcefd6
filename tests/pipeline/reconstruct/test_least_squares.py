from __future__ import annotations

import functools
import gc
import weakref

import nets
import pytest
import torch
from batchnorm_statistics import reestimate_on
from edge_compress.pipeline.graph.coupling import Coupling, couple
from edge_compress.pipeline.graph.surgery import cuts, prune
from edge_compress.pipeline.graph.trace import canonical
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.reconstruct.least_squares import solve, solve_masked, stitched_weight
from edge_compress.pipeline.reconstruct.reconstruction import columns, sequential
from edge_compress.pipeline.types import Plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(k: int, n: int, seed: int = 0) -> torch.Tensor:
    return (torch.eye(k, dtype=torch.float64) + 0.5 * randn(k, k, seed=seed + 1)) @ randn(k, n, seed=seed)


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=30)
def test_solved_weights_are_the_least_squares_solution(k, outputs, seed, data):
    keep = torch.tensor(sorted(data.draw(st.sets(st.integers(0, k - 1), min_size=1))))
    x, weight = correlated(k, 60, seed), randn(outputs, k, seed=seed + 2)
    expected = torch.linalg.lstsq(x[keep].T, (weight @ x).T).solution.T
    torch.testing.assert_close(solve(weight, x @ x.T, keep, damping=0.0), expected, rtol=1e-6, atol=1e-6)


@given(st.integers(2, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_solved_weights_answer_for_what_the_dense_inputs_were(k, seed):
    """The layer sees other inputs than the dense network's, and is to give what the dense layer gave."""
    dense, seen, weight = correlated(k, 60, seed), correlated(k, 60, seed), randn(3, k, seed=seed + 2)
    seen = seen + 0.3 * randn(k, 60, seed=seed + 3)
    keep = torch.arange(k)[::2]
    expected = torch.linalg.lstsq(seen[keep].T, (weight @ dense).T).solution.T
    found = solve(weight, seen @ seen.T, keep, cross=dense @ seen.T, damping=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@given(st.integers(2, 8), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=20)
def test_every_row_is_solved_on_its_own_support(k, seed, data):
    rows = [data.draw(st.sets(st.integers(0, k - 1))) for _ in range(3)]
    mask = torch.zeros(3, k)
    for row, keep in enumerate(rows):
        mask[row, list(keep)] = 1
    x, weight = correlated(k, 60, seed), randn(3, k, seed=seed + 2)
    found = solve_masked(weight, x @ x.T, mask, damping=0.0)
    assert not found[mask == 0].any()
    for row, keep in enumerate(rows):
        if keep:
            at = torch.tensor(sorted(keep))
            expected = torch.linalg.lstsq(x[at].T, (weight[row] @ x)[:, None]).solution[:, 0]
            torch.testing.assert_close(found[row, at], expected, rtol=1e-6, atol=1e-6)


def twins() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of which the last two are the same and one is always zero, and weights."""
    x = randn(6, 80)
    x[5], x[2] = x[4], 0.0
    return x, randn(3, 6, seed=1)


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.01])
def test_a_singular_gram_matrix_is_solved(damping):
    x, weight = twins()
    whole = weight @ x
    for found in (
        solve(weight, x @ x.T, torch.arange(6), damping=damping) @ x,
        solve(weight, x @ x.T, torch.tensor([0, 1, 2, 3, 5]), damping=damping) @ x[[0, 1, 2, 3, 5]],  # one of the twins is enough
        solve_masked(weight, x @ x.T, torch.ones(3, 6), damping=damping) @ x,
    ):
        assert float((found - whole).norm() / whole.norm()) < max(2 * damping, 1e-5)


@pytest.mark.parametrize("columns_seen", [0, 1, 3])
def test_too_few_positions_give_finite_weights(columns_seen):
    x = randn(6, max(columns_seen, 1)) * bool(columns_seen)
    found = solve(randn(3, 6, seed=1), x @ x.T, torch.arange(5))
    assert found.isfinite().all()
    assert float(found.norm()) < 1e3


def test_more_damping_stays_nearer_to_the_weights_of_before():
    x, weight = correlated(6, 80), randn(3, 6, seed=1)
    keep = torch.tensor([0, 2, 5])
    moved = [float((solve(weight, x @ x.T, keep, damping=d) - weight[:, keep]).norm()) for d in (0.0, 0.01, 0.1, 1.0, 1e6)]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 1.2 * moved[3]
    assert moved[-1] < 1e-4


@given(st.integers(2, 8), st.integers(1, 20), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_what_loses_nothing_stays_as_it_is_however_little_was_seen(k, n, seed):
    """Inputs on very different scales, and fewer of them than weights: a layer from which nothing was taken is not touched."""
    x = correlated(k, n, seed) * torch.logspace(-4, 1, k, dtype=torch.float64)[:, None]
    weight = randn(3, k, seed=seed + 2)
    torch.testing.assert_close(solve(weight, x @ x.T, torch.arange(k)), weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solve_masked(weight, x @ x.T, torch.ones(3, k)), weight, rtol=1e-9, atol=1e-9)


@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
)
@settings(deadline=None, max_examples=30)
def test_columns_are_what_the_convolution_multiplies(kernel, stride, dilation, padding, mode):
    if padding == "same":
        kernel, stride = kernel // 2 * 2 + 1, 1
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation, padding_mode=mode)
    x = nets.images(2, shape=(3, 7, 6))
    with torch.no_grad():
        expected = layer(x)
        found = layer.weight.flatten(1) @ columns(x, layer) + layer.bias[:, None]
        torch.testing.assert_close(found.view(4, 2, -1), expected.transpose(0, 1).flatten(2), rtol=1e-4, atol=1e-5)
        some = torch.tensor([0, expected[0, 0].numel() - 1])
        picked = layer.weight.flatten(1) @ columns(x, layer, some) + layer.bias[:, None]
        torch.testing.assert_close(picked.view(4, 2, -1), expected.transpose(0, 1).flatten(2)[:, :, some], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 5, 3, 2, 1), nn.Linear(6, 5)])
def test_a_compensated_layer_errs_less_than_a_cut_one(layer):
    mixed = torch.einsum("ij,njhw->nihw", torch.eye(6) + 0.6 * randn(6, 6).float(), nets.images(40, shape=(6, 6, 6)))
    inputs = mixed if isinstance(layer, nn.Conv2d) else mixed.mean((2, 3))
    keep = torch.tensor([0, 1, 3, 4])
    x = columns(inputs, layer)
    area = len(x) // 6
    kept = (keep[:, None] * area + torch.arange(area)).flatten()
    with torch.no_grad():
        wanted = layer.weight.flatten(1) @ x
        solved = stitched_weight(layer, x @ x.T, keep)
        assert solved.shape == (5, 4, *layer.weight.shape[2:])
        cut_error = (layer.weight[:, keep].flatten(1) @ x[kept] - wanted).norm()
        best = torch.linalg.lstsq(x[kept].T, wanted.T).solution.T @ x[kept]
        error = (solved.flatten(1) @ x[kept] - wanted).norm()
    assert error < 0.8 * cut_error
    assert error < 1.05 * (best - wanted).norm()


# ---------------------------------------------------------------------------------------------- layer after layer


def fractions(coupling: Coupling, share: float, blocks: tuple[str, ...] = ()) -> Plan:
    kept = {g: tuple(range(max(1, int(len(u) * share)))) for g, u in coupling.units.items()}
    return Plan(Pattern.CHANNEL, "", {g: k for g, k in kept.items() if len(k) < len(coupling.units[g])}, blocks)


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
def on_digits(name: str) -> tuple[fx.GraphModule, Coupling]:
    net = canonical(nets.trained(TRAINED[name]), (1, 8, 8))
    return net, couple(net)


def stitched(net: fx.GraphModule, coupling: Coupling, plan: Plan, inputs: torch.Tensor) -> fx.GraphModule:
    grams, gone, weights = nets.hessians(net, inputs), cuts(coupling, plan.kept), {}
    for name, module in net.named_modules():
        if (missing := gone.get((f"{name}.weight", 1))) and isinstance(module, nn.Conv2d | nn.Linear):
            keep = torch.tensor([i for i in range(module.weight.shape[1]) if i not in missing])
            weights[name] = stitched_weight(module, grams[name], keep)
    small = prune(net, coupling, plan, weights)
    reestimate_on(small, [inputs])
    return small


@pytest.mark.parametrize("name", TRAINED)
def test_layer_after_layer_keeps_more_accuracy_than_stitching_and_cutting(name):
    net, coupling = on_digits(name)
    inputs = nets.digits()[0][:500]
    plan = fractions(coupling, 0.4)
    cut = prune(net, coupling, plan)
    reestimate_on(cut, [inputs])
    plain, patched = nets.accuracy(cut), nets.accuracy(stitched(net, coupling, plan, inputs))
    solved = nets.accuracy(sequential(net, coupling, plan, inputs))
    assert nets.accuracy(net) > 0.85
    assert solved > plain + 0.2
    assert solved > patched + 0.02


@pytest.mark.parametrize("name", ["padded shortcuts", "projections", "pre-activation"])
def test_what_removed_blocks_did_is_taken_over_by_those_that_stay(name):
    net, coupling = on_digits(name)
    inputs = nets.digits()[0][:500]
    plan = fractions(coupling, 0.75, tuple(coupling.blocks)[1::2])
    assert plan.removed_blocks
    cut = prune(net, coupling, plan)
    reestimate_on(cut, [inputs])
    small = sequential(net, coupling, plan, inputs)
    assert nets.accuracy(small) > nets.accuracy(cut) + 0.2
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in cut.state_dict().items()}
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
    net, coupling = on_digits(name)
    inputs = nets.digits()[0][:500]
    small = sequential(net, coupling, Plan(Pattern.CHANNEL, "", {}, (block,)), inputs)
    before, after = (
        float((found - wanted).norm() / wanted.norm())
        for wanted, found in zip(read_by(net, layers, inputs), read_by(small, layers, inputs), strict=True)
    )
    assert before > 0.3
    assert after < 0.63 * before


@pytest.mark.parametrize("name", nets.NETS)
def test_a_plan_that_removes_nothing_gives_the_dense_function(name):
    net, coupling = nets.subject(name)
    same = sequential(net, coupling, Plan(Pattern.CHANNEL, ""), nets.images(8))
    with torch.no_grad():
        expected, found = net(nets.images(seed=5)), same(nets.images(seed=5))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-3


@pytest.mark.parametrize("name", nets.NETS)
def test_every_kind_of_network_can_be_solved(name):
    """Cut by a quarter, blocks out, layers re-solved: the answers are nearer to the dense network's than without solving."""
    net, coupling = nets.subject(name)
    plan, inputs = fractions(coupling, 0.75, tuple(coupling.blocks)[1::2]), nets.images(200)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    cut = prune(net, coupling, plan)
    small = sequential(net, coupling, plan, inputs)
    with torch.no_grad():
        wanted, plain, solved = (n(inputs) for n in (net, cut, small))
    assert float((solved - wanted).norm()) < 0.9 * float((plain - wanted).norm())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_solving_again_gives_the_same_bits():
    net, coupling = on_digits("projections")
    plan, inputs = fractions(coupling, 0.5), nets.digits()[0][:120]
    first, second = (sequential(net, coupling, plan, inputs).state_dict() for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_progress_rises_to_the_end():
    net, coupling = nets.subject("OptionA")
    seen: list[float] = []
    sequential(net, coupling, fractions(coupling, 0.5), nets.images(8), progress=seen.append)
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


def most_alive(blocks: int, removed: int) -> int:
    """The largest number of the dense network's activations that were alive at once."""
    net = canonical(nets.drawn(lambda: Deep(blocks)), nets.SHAPE)
    coupling = couple(net)
    held: list[weakref.ref[torch.Tensor]] = []
    alive = []
    dense = set(net.modules())

    def note(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if module in dense:  # not the copy that is solved
            held.append(weakref.ref(output))

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU):
            module.register_forward_hook(note)
    plan = Plan(Pattern.CHANNEL, "", {"stem.0": (0, 1, 3)}, tuple(list(coupling.blocks)[1 : 1 + removed]))
    sequential(net, coupling, plan, nets.images(4), progress=lambda _: alive.append(sum(r() is not None for r in held)))
    gc.collect()
    assert len(held) > 3 * blocks  # every one was computed
    return max(alive)


def test_dense_activations_are_freed_as_the_walk_goes_on():
    shallow, deep = most_alive(3, removed=0), most_alive(12, removed=0)
    assert deep == shallow
    assert deep <= 10
    assert most_alive(12, removed=2) <= 20
