"""Local curvature against exact Hessians of small float64 networks."""

from __future__ import annotations

import copy

import finite_differences
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.exact_mode import Batch, weight_layers
from edge_compress.pipeline.score import curvature
from scipy.stats import spearmanr
from torch import Tensor, nn


def network(*, groups: int = 1, smooth: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolutions with stride, padding, groups; BatchNorm with statistics; in-place activation right after a convolution."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.Softplus() if smooth else nn.ReLU(),
            nn.Conv2d(4, 4, (1, 3), padding="same", groups=groups),
            nn.ELU(inplace=True) if smooth else nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
        norm = net[1]
        assert isinstance(norm, nn.BatchNorm2d)
        norm.running_mean = torch.randn(4)
        norm.running_var = torch.rand(4) + 0.5
    return net.to(dtype).train()  # training mode: the functions must switch to eval themselves


def images(count: int, seed: int = 1, size: int = 6) -> Batch:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, 2, size, size))), torch.from_numpy(rng.integers(0, 3, count))


def split(batch: Batch, *sizes: int) -> list[Batch]:
    return list(zip(batch[0].split(list(sizes)), batch[1].split(list(sizes)), strict=True))


def flat(values: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([v.flatten() for v in values.values()]).double().numpy()


def logits_of_weights(net: nn.Module, inputs: Tensor):
    """(weights -> logits, the weights now), in eval mode."""
    net = copy.deepcopy(net).eval().requires_grad_(False)
    names = [f"{n}.weight" for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    now = dict(net.named_parameters())
    sizes = [now[n].numel() for n in names]

    def logits(vector: Tensor) -> Tensor:
        parts = {n: p.view(now[n].shape) for n, p in zip(names, vector.split(sizes), strict=True)}
        return torch.func.functional_call(net, parts, (inputs,))

    return logits, torch.cat([now[n].detach().flatten() for n in names])


def exact_hessian(net: nn.Module, batch: Batch) -> Tensor:
    logits, now = logits_of_weights(net, batch[0])
    return torch.autograd.functional.hessian(lambda w: F.cross_entropy(logits(w), batch[1]), now)


def exact_gauss_newton(net: nn.Module, batch: Batch) -> np.ndarray:
    logits, now = logits_of_weights(net, batch[0])
    jacobian = torch.func.jacrev(logits)(now)  # (N, classes, weights)
    p = logits(now).softmax(1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncw,ncd,ndw->w", jacobian, middle, jacobian).div(len(p)).numpy()


def per_image_squares(net: nn.Module, batch: Batch) -> np.ndarray:
    total = 0
    for i in range(len(batch[0])):
        logits, now = logits_of_weights(net, batch[0][i : i + 1])
        total += torch.func.grad(lambda w, f=logits, y=batch[1][i : i + 1]: F.cross_entropy(f(w), y))(now).square().numpy()
    return total / len(batch[0])


def test_gradient_difference_is_hutchinsons_estimate_of_the_exact_hessian() -> None:
    net, batch = network(), images(6)
    hessian = exact_hessian(net, batch)
    generator = torch.Generator().manual_seed(5)
    layers = weight_layers(net)
    expected = torch.zeros(len(hessian), dtype=torch.float64)
    for _ in range(3):
        v = torch.cat([torch.randint(0, 2, m.weight.shape, generator=generator).flatten() * 2.0 - 1 for m in layers.values()])
        expected += v * (hessian @ v.double()) / 3
    found = finite_differences.gradient_difference(net, split(batch, 2, 4), probes=3, step=1e-4, seed=5)
    np.testing.assert_allclose(flat(found), expected.numpy(), rtol=1e-5, atol=1e-7)
    assert {n: v.shape for n, v in found.items()} == {n: m.weight.shape for n, m in layers.items()}


def test_gradient_difference_converges_to_the_exact_diagonal() -> None:
    net, batch = network(), images(6)
    exact = exact_hessian(net, batch).diagonal().numpy()
    errors = []
    for probes in (4, 900):
        found = flat(finite_differences.gradient_difference(net, [batch], probes=probes, step=1e-3))
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert errors[1] < errors[0] / 7  # 1/sqrt(225) = a 15th in expectation
    assert spearmanr(found, exact).statistic > 0.8


def test_absolute_differences_are_a_proxy_of_the_row_norm_and_not_of_the_diagonal() -> None:
    net, batch = network(), images(6)
    hessian = exact_hessian(net, batch)
    found = flat(finite_differences.gradient_difference(net, [batch], probes=64, absolute=True))
    rows = hessian.norm(dim=1).numpy() * np.sqrt(2 / np.pi)
    assert spearmanr(found, rows).statistic > 0.97
    np.testing.assert_allclose(found.mean(), rows.mean(), rtol=0.15)
    assert found.mean() > 1.5 * hessian.diagonal().abs().mean()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_empirical_fisher_is_the_mean_square_of_per_image_gradients(groups: int) -> None:
    net, batch = network(groups=groups), images(5)
    found = flat(curvature.gauss_newton(net, split(batch, 2, 3), empirical=True))
    np.testing.assert_allclose(found, per_image_squares(net, batch), rtol=1e-8)


def test_gauss_newton_is_the_exact_diagonal_in_expectation() -> None:
    net, batch = network(), images(5)
    exact = exact_gauss_newton(net, batch)
    many = (batch[0].repeat(300, 1, 1, 1), batch[1].repeat(300))  # 5 images, 3,000 drawn labels each

    def off(found: dict[str, Tensor]) -> float:
        return float(np.abs(flat(found) / exact - 1).max())

    assert off(curvature.gauss_newton(net, [many], draws=10)) < 0.2
    assert off(curvature.gauss_newton(net, [many], empirical=True)) > 0.4  # the test can tell the two apart


def test_gauss_newton_ranks_like_the_papers_differences_one_connection_at_a_time() -> None:
    net, batch = network(smooth=False), images(12)  # piecewise linear: Hessian and Gauss-Newton have one diagonal

    def loss(module: nn.Module) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    oracle, exact = [], exact_hessian(net, batch).diagonal().numpy()
    for name, layer in weight_layers(net).items():
        for index in np.ndindex(*layer.weight.shape):
            oracle.append(finite_differences.second_difference(net, loss, name, index, 1e-4))
    np.testing.assert_allclose(oracle, exact, rtol=1e-3, atol=1e-6)
    found = flat(curvature.gauss_newton(net, [batch], draws=50))
    assert spearmanr(found, oracle).statistic > 0.95


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_local_hessian_is_that_of_explicitly_gathered_patches(groups: int, padding_mode: str) -> None:
    layer = nn.Conv2d(
        4, 8, (3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2), groups=groups, padding_mode=padding_mode
    ).double()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4, 7, 6)))
    padded = F.pad(x, (1, 1, 1, 1), "constant" if padding_mode == "zeros" else padding_mode)
    out = layer(x)
    per = 4 // groups
    expected = torch.zeros(groups, per * 6, per * 6, dtype=torch.float64)
    for n, i, j in np.ndindex(5, out.shape[2], out.shape[3]):
        patch = padded[n, :, 2 * i : 2 * i + 3, j : j + 3 : 2]  # (C, 3, 2)
        rows = patch.reshape(groups, -1)
        expected += rows[:, :, None] * rows[:, None, :]
    expected /= 5 * out.shape[2] * out.shape[3]
    found = curvature.local_hessian(nn.Sequential(layer), [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(3))])["0"]
    assert found.shape == ((per * 6, per * 6) if groups == 1 else (groups, per * 6, per * 6))
    torch.testing.assert_close(found, expected.squeeze(0) if groups == 1 else expected)

    # It is the Hessian of the output error, in the order of weight.flatten(1), and its diagonal is the layer-local curvature.
    change = torch.from_numpy(np.random.default_rng(1).normal(size=layer.weight.shape))
    moved = F.conv2d(padded, change, stride=layer.stride, dilation=layer.dilation, groups=groups)
    rows = change.view(groups, 8 // groups, -1)
    quadratic = torch.einsum("gok,gkl,gol->", rows, found.view(groups, per * 6, per * 6), rows)
    torch.testing.assert_close(moved.square().sum() / (5 * out.shape[2] * out.shape[3]), quadratic)
    diagonal = finite_differences.local_diagonal(found, layer.weight)
    one = torch.zeros_like(layer.weight)
    one[5, per - 1, 2, 1] = 1.0
    alone = F.conv2d(padded, one, stride=layer.stride, dilation=layer.dilation, groups=groups).square().sum()
    torch.testing.assert_close(diagonal[5, per - 1, 2, 1], alone.detach() / (5 * out.shape[2] * out.shape[3]))


def test_local_hessian_of_a_linear_layer_takes_the_layers_asked_for_and_every_position() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 5, 3)))
    found = curvature.local_hessian(net, [(x, torch.zeros(6))], layers=["2"])
    hidden = torch.tanh(net[0](x)).reshape(-1, 4).detach()
    assert set(found) == {"2"}
    torch.testing.assert_close(found["2"], hidden.T @ hidden / 30)


def test_results_do_not_depend_on_chunks_or_batches() -> None:
    net, batch = network(groups=2, dtype=torch.float32), images(9)
    net = net.to(memory_format=torch.channels_last)
    for call in (
        lambda batches, chunk: curvature.gauss_newton(net, batches, empirical=True, chunk=chunk),
        lambda batches, chunk: curvature.local_hessian(net, batches, chunk=chunk),
    ):
        reference = call([batch], 1 << 23)
        for batches, chunk in (([batch], 1), ([batch], 500), (split(batch, 4, 5), 1 << 23)):
            for name, value in call(batches, chunk).items():
                torch.testing.assert_close(value, reference[name], rtol=2e-5, atol=1e-7)


def test_the_network_is_left_bit_for_bit_as_it_was() -> None:
    net, batch = network(dtype=torch.float32), images(4)
    net[0].weight.requires_grad_(False)
    net[4].eval()
    net[6].weight.grad = torch.ones_like(net[6].weight)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    inputs = batch[0].clone()

    def failing(module: nn.Module) -> Tensor:
        raise RuntimeError("the loss fails")

    finite_differences.gradient_difference(net, [batch], probes=2)
    curvature.gauss_newton(net, [batch], draws=2)
    curvature.local_hessian(net, [batch])
    finite_differences.second_difference(net, lambda m: m(batch[0].float()).sum(), "3", (0, 0, 0, 1), 1e-3)
    with pytest.raises(RuntimeError, match="the loss fails"):
        finite_differences.second_difference(net, failing, "3", (0, 0, 0, 1), 1e-3)
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert [m.training for m in net.modules()] == modes
    assert [net[i].weight.requires_grad for i in (0, 3)] == [False, True]
    assert torch.equal(net[6].weight.grad, torch.ones_like(net[6].weight))
    assert net[3].weight.grad is None
    assert torch.equal(batch[0], inputs)
    assert not any(m._forward_hooks for m in net.modules())


def test_same_seed_same_bits_and_another_seed_another_estimate() -> None:
    net, batch = network(dtype=torch.float32), images(4)
    for call in (
        lambda seed: finite_differences.gradient_difference(net, [batch], probes=2, seed=seed),
        lambda seed: curvature.gauss_newton(net, [batch], seed=seed),
    ):
        first, again, other = flat(call(3)), flat(call(3)), flat(call(4))
        assert np.array_equal(first, again)
        assert not np.allclose(first, other, rtol=1e-3)


def test_autocast_and_fast_matrix_products_outside_change_nothing() -> None:
    net, batch = network(dtype=torch.float32), images(4)

    def everything() -> list[np.ndarray]:
        return [
            flat(finite_differences.gradient_difference(net, [batch], probes=2)),
            flat(curvature.gauss_newton(net, [batch], draws=2)),
            flat(curvature.local_hessian(net, [batch])),
        ]

    plain = everything()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert net[6](torch.ones(1, 36)).dtype is torch.bfloat16  # autocast does act here
        mixed = everything()
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            fast = everything()
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before
    for a, b, c in zip(plain, mixed, fast, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)


class Spy(nn.Linear):
    """Notes how float32 products are computed while it runs: a CPU without bfloat16 units would not show it in the result."""

    def forward(self, x: Tensor) -> Tensor:
        backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul
        self.seen = [backend.fp32_precision for backend in backends]
        return super().forward(x)


def test_float32_products_are_exact_inside_and_as_they_were_outside() -> None:
    for call in (
        curvature.gauss_newton,
        curvature.local_hessian,
        lambda m, b: finite_differences.gradient_difference(m, b, probes=1),
    ):
        spy = Spy(4, 4)
        spy(torch.ones(1, 4))
        before = spy.seen
        assert before != ["ieee"] * 4  # cuDNN's default is TF32
        call(spy, vectors())
        assert spy.seen == ["ieee"] * 4
        spy(torch.ones(1, 4))
        assert spy.seen == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_gives_the_cpus_curvature() -> None:
    net, batch = network(dtype=torch.float32, groups=2), images(8)
    there = copy.deepcopy(net).cuda()
    for call in (
        lambda m: finite_differences.gradient_difference(m, [batch], probes=4, step=1e-2),
        lambda m: curvature.gauss_newton(m, [batch], empirical=True),
        lambda m: curvature.local_hessian(m, [batch]),
    ):
        with torch.autocast("cuda"):
            found = call(there)
        for name, value in call(net).items():
            assert found[name].is_cuda
            torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


class BehindItsBack(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.unused.weight)


class Unused(Twice):
    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean()  # in place on its input
        return self.layer(x)


def vectors() -> list[Batch]:
    return [(torch.linspace(-1, 1, 12).view(3, 4) ** 2, torch.tensor([0, 1, 2]))]


def test_layers_that_per_image_gradients_cannot_serve_are_named() -> None:
    with pytest.raises(InputError, match="'layer' is called twice"):
        curvature.gauss_newton(Twice(), vectors())
    with pytest.raises(InputError, match="'unused' is used outside"):
        curvature.gauss_newton(BehindItsBack(), vectors())
    rows = nn.Sequential(nn.Flatten(0, 1), nn.Linear(2, 2), nn.Unflatten(0, (3, 2)), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(InputError, match="'1' cannot be told apart: found 6 rows for 3 images"):
        curvature.gauss_newton(rows, [(torch.ones(3, 2, 2), torch.zeros(3, dtype=torch.long))])


def test_a_layer_the_forward_pass_leaves_out_has_no_curvature() -> None:
    batches = vectors()
    before = batches[0][0].clone()
    for found in (curvature.gauss_newton(Unused(), batches), finite_differences.gradient_difference(Unused(), batches, probes=2)):
        assert found["unused"].abs().max() == 0
        assert found["layer"].abs().max() > 0
    assert torch.equal(batches[0][0], before)
    assert set(curvature.local_hessian(Unused(), batches)) == {"layer"}
    with pytest.raises(InputError, match="'unused' is never called"):
        curvature.local_hessian(Unused(), batches, layers=["unused"])


def test_what_cannot_be_estimated_is_refused_with_its_name() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="layers '0' and '1' share one weight"):
        curvature.gauss_newton(tied, vectors())
    with pytest.raises(InputError, match="'0' is not a parameter"):
        curvature.gauss_newton(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), vectors())
    with pytest.raises(InputError, match=r"found torch\.float16"):
        curvature.local_hessian(nn.Linear(4, 4).half(), vectors())
    with pytest.raises(InputError, match="nothing to prune"):
        finite_differences.gradient_difference(nn.ReLU(), vectors(), probes=1)
    with pytest.raises(InputError, match="calibration images: found none"):
        curvature.local_hessian(nn.Linear(4, 4), [])
    bad = vectors()
    bad[0][0][1, 1] = float("nan")
    with pytest.raises(InputError, match="outputs are not finite"):
        curvature.gauss_newton(nn.Linear(4, 4), bad)
    with pytest.raises(InputError, match="curvature of layer '' is not finite"):
        curvature.local_hessian(nn.Linear(4, 4), bad)
    with pytest.raises(InputError, match="no layer 'x' in the model"):
        curvature.local_hessian(nn.Linear(4, 4), vectors(), layers=["x"])

    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    with pytest.raises(InputError, match=r"'0' \(Same\) does not compute what its padding says"):
        curvature.local_hessian(nn.Sequential(Same(1, 1, 3)), [(torch.ones(1, 1, 5, 5), torch.zeros(1))])
    with pytest.raises(InputError, match=r"'0' \(Same\) does not compute what its padding says"):
        curvature.gauss_newton(nn.Sequential(Same(1, 1, 3), nn.Flatten()), [(torch.ones(2, 1, 5, 5), torch.zeros(2))])
