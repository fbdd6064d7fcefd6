"""Networks that passed the gate and then ran wrong, or not at all, or that it locked for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.axes.coupling import couple
from edge_compress.pipeline.axes.cutting import gate
from edge_compress.pipeline.axes.cutting.gate import Checked, check, half
from edge_compress.pipeline.axes.cutting.surgery import cut, zeroed
from edge_compress.pipeline.axes.inspect import inspect
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    """Modules by name, and a forward that is given."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def checked(net: nn.Module, example: Any) -> Checked:
    return check(couple(capture(net.eval(), example)))


def halves(found: Checked) -> dict[str, list[int]]:
    return {group.name: half(group) for group in found.coupling.open_groups()}


def assert_cut_is_zeroed(found: Checked, plan: Mapping[str, list[int]], inputs: Tensor) -> None:
    with torch.no_grad():
        answer, expected = cut(found.coupling, plan, found.sized)(inputs), zeroed(found.coupling, plan)(inputs)
    assert torch.allclose(answer, expected, atol=1e-4 * float(expected.max() - expected.min()))


def pooled(y: Tensor, head: nn.Module) -> Tensor:
    result: Tensor = head(y.mean((2, 3)))
    return result


def grouped_excitation(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    n, _, h, w = y.shape
    parts = y.view(n * 4, -1, h, w)
    gate = (parts * parts.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
    gate = torch.sigmoid(gate - gate.mean((2, 3), keepdim=True))
    return pooled(net.b((parts * gate).view(n, -1, h, w)), net.head)


def attention_by_batches_of_heads(net: Any, x: Tensor) -> Tensor:
    n, t, c = x.shape
    q, k, v = (y.view(n, t, 4, c // 4).transpose(1, 2).reshape(n * 4, t, c // 4) for y in net.qkv(x).chunk(3, -1))
    mixed = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
    return net.out(mixed.view(n, 4, t, -1).transpose(1, 2).reshape(n, t, -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", ["spatial groups", "heads"])
def test_sizes_multiplied_by_the_batch_follow_it(case: str) -> None:
    if case == "spatial groups":
        parts = {"a": nn.Conv2d(1, 32, 3, padding=1), "b": nn.Conv2d(32, 16, 3, padding=1), "head": nn.Linear(16, 5)}
        net, inputs = Net(grouped_excitation, **parts), torch.randn(3, 1, 8, 8)
    else:
        net = Net(attention_by_batches_of_heads, qkv=nn.Linear(24, 72), out=nn.Linear(24, 24))
        inputs = torch.randn(3, 6, 24)
    found = checked(net, inputs[:1])
    plan = halves(found)
    assert plan
    assert_cut_is_zeroed(found, plan, inputs)
    trained = cut(found.coupling, plan, found.sized).train()
    trained(inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())


def test_attention_whose_width_alone_shrinks_still_runs() -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    net = Net(lambda s, x: s.head(s.i(x) + s.m(*[s.i(x)] * 3)[0]), i=nn.Linear(8, 32), m=attention, head=nn.Linear(32, 5))
    found = checked(net, torch.randn(1, 6, 8))
    (stream,) = [group for group in found.coupling.open_groups() if group.kind == "stream"]
    assert_cut_is_zeroed(found, {stream.name: half(stream)}, torch.randn(2, 6, 8))


@pytest.mark.parametrize("turned", [torch.fft.rfft, lambda y: (100 * y).long()])
def test_outputs_that_are_not_real_numbers_are_compared(turned: Callable[[Tensor], Tensor]) -> None:
    net = Net(
        lambda s, x: turned(s.head(torch.sigmoid(s.a(x)).sum(1, keepdim=True))), a=nn.Conv2d(1, 16, 3), head=nn.Conv2d(1, 4, 1)
    )
    found = checked(net, torch.randn(1, 1, 9, 9))
    assert "a" in found.coupling.locked_groups  # a removed channel's sigmoid of zero is in the sum of the full network


class Dropped(nn.Module):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        return x if not self.training else x * (torch.rand(x.shape[0], 1, 1) > 0.2) / 0.8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.drop, self.gain = Dropped(), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.drop(self.gain * self.f(self.norm(x)))
        return result


@pytest.mark.parametrize("samples", [1, 3])
def test_a_branch_that_is_left_out_before_stochastic_depth_trains(samples: int) -> None:
    net = nn.Sequential(nn.Linear(8, 16), Residual(), Residual(), nn.Linear(16, 5))
    found = checked(net, torch.randn(1, 4, 8))
    assert found.coupling.blocks
    small = cut(found.coupling, {block.name: [0] for block in found.coupling.blocks}, found.sized).train()
    assert small(torch.randn(samples, 4, 8)).shape == (samples, 4, 5)


def test_units_that_only_training_reads_stay() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = s.b(s.a(x).relu()).relu()
        return (pooled(y, s.head), pooled(y, s.aside)) if s.training else pooled(y, s.head)

    parts = {"a": nn.Conv2d(1, 16, 3), "b": nn.Conv2d(16, 24, 3), "head": nn.Linear(24, 5), "aside": nn.Linear(24, 5)}
    found = checked(Net(forward, **parts), torch.randn(1, 1, 9, 9))
    assert {group.name for group in found.coupling.open_groups()} == {"a"}
    assert "in training mode" in found.coupling.locked_groups["b"]


def test_a_recurrent_layer_counts_in_the_share_that_can_be_pruned() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.head(s.r(s.p(x).transpose(1, 2))[0])  # type: ignore[no-any-return]

    net = Net(forward, p=nn.Conv1d(4, 16, 3), r=nn.GRU(16, 32, batch_first=True, bidirectional=True), head=nn.Linear(64, 5))
    report = inspect(net.eval(), torch.randn(1, 4, 12))
    weights = sum(p.numel() for name, p in net.r.named_parameters() if "weight" in name)
    assert report.macs >= 10 * weights
    assert report.prunable_macs_share < 0.1
    assert report.locked[0].operation == "gru"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which the full network's fused path uses
def test_a_padding_mask_locks_nothing_and_left_out_branches_run_as_users_run_them() -> None:
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(s: Any, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -2:] = True
        return s.head(s.e(s.i(x), src_key_padding_mask=padding))[:, :-2]  # type: ignore[no-any-return]

    net = Net(forward, i=nn.Linear(8, 32), e=layers, head=nn.Linear(32, 5))
    found = checked(net, torch.randn(1, 6, 8))
    assert {group.kind for group in found.coupling.open_groups()} >= {"mlp", "head"}
    assert len(found.coupling.blocks) == 4
    for block in found.coupling.blocks:
        small = cut(found.coupling, {block.name: [0]}, found.sized)
        with torch.no_grad():
            assert small(torch.randn(2, 6, 8)).shape == (2, 4, 5)
    assert_cut_is_zeroed(found, halves(found), torch.randn(2, 6, 8))


def test_infinite_outputs_and_units_that_divide_lock_nothing() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        y = s.b(y + torch.sin(s.rate * y) ** 2 / s.rate)  # Snake (Ziyin et al. 2020)
        return y.flatten(1).masked_fill(torch.arange(y[0].numel()) < 3, float("-inf"))

    net = Net(forward, a=nn.Conv1d(2, 16, 3), b=nn.Conv1d(16, 4, 3), rate=nn.Parameter(torch.rand(16, 1) + 0.5))
    found = checked(net, torch.randn(1, 2, 12))
    assert [group.name for group in found.coupling.open_groups()] == ["a"]
    assert found.passed


@pytest.mark.parametrize("equation", ["...i,oi->...o", "btc,zc", "...i,oi"])
def test_einsum_may_leave_letters_to_dots_and_its_result_unwritten(equation: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.head(torch.einsum(equation, x, s.weight).relu())  # type: ignore[no-any-return]

    found = checked(Net(forward, weight=nn.Parameter(torch.randn(16, 8)), head=nn.Linear(16, 5)), torch.randn(1, 6, 8))
    assert [len(group.units) for group in found.coupling.open_groups()] == [16]
    assert_cut_is_zeroed(found, halves(found), torch.randn(3, 6, 8))


def test_columns_stacked_are_columns_joined() -> None:
    net = Net(
        lambda s, x: s.head(torch.hstack([s.a(x).relu(), s.b(x).relu()])),
        a=nn.Linear(8, 12),
        b=nn.Linear(8, 8),
        head=nn.Linear(20, 3),
    )
    found = checked(net, torch.randn(1, 8))
    assert {group.name for group in found.coupling.open_groups()} == {"a", "b"}
    assert_cut_is_zeroed(found, halves(found), torch.randn(3, 8))


def test_attention_that_appends_keys_of_its_own_says_so() -> None:
    attention = nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)
    net = Net(lambda s, x: s.head(s.m(*[s.i(x)] * 3)[0]), i=nn.Linear(8, 32), m=attention, head=nn.Linear(32, 5))
    found = checked(net, torch.randn(1, 6, 8))
    assert any("add_bias_kv" in why for why in found.coupling.locked_groups.values())


class Remembering(nn.Module):
    """Attention that builds a table of positions when it first runs, in calls that take shapes, and keeps it."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.table = heads, torch.zeros(0)
        self.qkv, self.proj, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        if self.table.numel() == 0:
            self.table = torch.arange(tokens).view(1, -1).float() - torch.arange(tokens).view(-1, 1).float()
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) - self.table.abs()).softmax(-1)
        return self.head(self.proj((scores @ v).transpose(1, 2).reshape(n, tokens, width)).mean(1))


def test_what_forward_builds_in_its_first_run_locks_no_heads() -> None:
    net, inputs = Remembering(), torch.randn(2, 6, 24)
    found = checked(net, inputs[:1])
    assert net.table.numel() == 0  # the user's module is as it was
    assert {"head", "head_dim"} <= {group.kind for group in found.coupling.open_groups()}
    assert_cut_is_zeroed(found, halves(found), inputs)


class Single(nn.Module):
    """Samples a map at points that forward makes in single precision; what its labels say of one layer is not so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        points = torch.zeros(len(x), 4, 4, 2)
        return pooled(nn.functional.grid_sample(y, points, align_corners=False), self.head)


class Rounding(nn.Module):
    """Single precision alone makes an error that depends on the number of channels, as sums in another order do."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(8, 4)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if y.dtype == torch.float32:
            y = y * (1 + self.error * y.shape[1])
        return pooled(self.b(y).relu(), self.head)


def test_what_differs_in_single_precision_alone_locks_nothing() -> None:
    found = checked(Rounding(1e-3), torch.randn(1, 3, 8, 8))
    assert {group.name for group in found.coupling.open_groups()} == {"a", "b"}
    assert found.passed
    assert found.difference is not None
    assert found.difference < 1e-9  # as in float64
    plan = halves(found)
    with torch.no_grad():
        answer, expected = (f(found.coupling, plan)(torch.ones(1, 3, 8, 8)) for f in (cut, zeroed))
    assert float((answer - expected).abs().max()) > 1e-4 * float(expected.max() - expected.min())


def test_a_forward_in_single_precision_only_is_checked_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def difference(found: list[Tensor], expected: list[Tensor]) -> float:
        asked.append(found[0].dtype)
        return 2e-4  # as by rounding, in a deep network

    net, inputs = Single(), torch.randn(1, 3, 8, 8)
    assert checked(net, inputs).coupling.open_groups()
    monkeypatch.setattr(gate, "relative_difference", difference)
    found = checked(net, inputs)
    assert set(asked) == {torch.float32}
    assert [lock.reason for lock in found.coupling.locked() if "differ by" in lock.reason]
