"""A residual branch that is left out leaves the network that has zeros in its place, in the user's own class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import user_net
from edge_compress.pipeline.axes.capture import capture, tensors_in
from edge_compress.pipeline.axes.coupling import Coupling, Plan, couple
from edge_compress.pipeline.axes.cutting import sound_blocks
from edge_compress.pipeline.axes.cutting.gate import Checked, check
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.evaluate.unit_evaluator import macs_left
from edge_compress.pipeline.reconstruct.sequential import sequential
from networks import NETWORKS
from small_transformers import TRANSFORMERS
from torch import nn

NETS: dict[str, Callable[[], nn.Module]] = {
    "attending": user_net.attending,
    "projected": user_net.projected,
    **{name: TRANSFORMERS[name] for name in ("packed", "torch_attention", "gated_mlp")},
}


def checked(name: str) -> Checked:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    with torch.no_grad():
        for tensor in net.parameters():
            if 0 < float(tensor.max()) < 0.1 and tensor.min() == tensor.max():
                tensor.fill_(0.5)  # layer scale, at first so small that branches do nothing
    return check(couple(capture(net, torch.randn(1, 1, 8, 8))))


def answer(net: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return list(tensors_in(net(inputs)))[-1]


class Halves(nn.Module):
    """A residual branch that ends in a product of two halves of a layer's outputs: one zero in its place cannot be cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x[:, 0]).mean(1)
        left, right = self.up(x).chunk(2, 1)
        return self.head(x + left * right)


class Shifted(nn.Module):
    """A residual branch that gives no zero where its layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x[:, 0]).mean(1)
        return self.head(x + torch.sigmoid(self.layer(x)))


class InPlace(nn.Module):
    """The shortcut is added to the branch's own tensor, after a scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.rand(16, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = self.scale * self.branch(x)
        y += x
        return self.head(y.mean((2, 3)))


class Looking(nn.Module):
    """A forward that reads a size from a layer of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x[:, 0]).mean(1)
        return self.head(x + self.down(self.up(x).relu() / self.up.out_features))


def test_layers_that_forward_looks_at_stay_unused() -> None:
    found = check(couple(capture(Looking().eval(), torch.randn(1, 1, 8, 8))))
    (block,) = found.coupling.blocks
    assert (block.modules, block.unused) == (("down",), ("up",))
    small = cut(found.coupling, {block.name: [0]}, found.sized)
    assert isinstance(small.up, nn.Linear)
    assert not isinstance(small.down, nn.Linear)


@pytest.mark.parametrize("name", NETS)
def test_the_network_without_a_branch_is_the_one_in_which_the_branch_gives_zero(name: str) -> None:
    found = checked(name)
    dense, x = found.coupling.walk.captured.module, torch.randn(3, 1, 8, 8)
    assert found.coupling.blocks
    for block in found.coupling.blocks:
        small = cut(found.coupling, {block.name: [0]}, found.sized)
        handle = dense.get_submodule(block.modules[-1]).register_forward_hook(lambda _module, _inputs, given: zeros(given))
        expected = answer(dense, x)
        handle.remove()
        assert not torch.allclose(expected, answer(dense, x), rtol=1e-3)
        torch.testing.assert_close(answer(small, x), expected)
        assert type(small) is type(dense)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())


def zeros(given: object) -> object:
    if isinstance(given, torch.Tensor):
        return torch.zeros_like(given)
    assert isinstance(given, tuple)  # torch's attention gives its weights too
    return tuple(torch.zeros_like(part) if isinstance(part, torch.Tensor) else part for part in given)


def test_a_branch_whose_tensor_the_shortcut_is_added_to_in_place_can_go() -> None:
    found = check(couple(capture(InPlace().eval(), torch.randn(1, 1, 8, 8))))
    (block,) = found.coupling.blocks
    assert (block.full, block.shape) == (True, (16, 6, 6))
    small, dense, x = (
        cut(found.coupling, {block.name: [0]}, found.sized),
        found.coupling.walk.captured.module,
        torch.randn(3, 1, 8, 8),
    )
    handle = dense.get_submodule("branch").register_forward_hook(lambda _module, _inputs, given: torch.zeros_like(given))
    torch.testing.assert_close(answer(small, x), answer(dense, x))
    handle.remove()


def test_a_branch_whose_tensor_forward_cuts_in_two_goes_with_zeros_of_its_shape() -> None:
    found = check(couple(capture(Halves().eval(), torch.randn(1, 1, 8, 8))))
    (block,) = found.coupling.blocks
    assert (block.full, block.shape) == (True, (32,))
    small, dense, x = (
        cut(found.coupling, {block.name: [0]}, found.sized),
        found.coupling.walk.captured.module,
        torch.randn(3, 1, 8, 8),
    )
    torch.testing.assert_close(answer(small, x), dense.head(dense.stem(x[:, 0]).mean(1)))


class Swish(nn.Module):
    """A residual branch that is read twice before the sum: by an activation, and by the product with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 16, 3), nn.Linear(16, 3)
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.conv(x))
        return self.head((y * torch.sigmoid(y) + x).mean((2, 3)))


def test_the_branch_is_what_the_sum_alone_reads_and_not_the_shortcut() -> None:
    found = check(couple(capture(Swish().eval(), torch.randn(1, 1, 8, 8))))
    (block,) = found.coupling.blocks
    assert (block.name, block.modules) == ("block:conv", ("conv", "norm"))
    small, dense, x = (
        cut(found.coupling, {block.name: [0]}, found.sized),
        found.coupling.walk.captured.module,
        torch.randn(3, 1, 8, 8),
    )
    torch.testing.assert_close(answer(small, x), dense.head(dense.stem(x).mean((2, 3))))


@pytest.mark.parametrize("name", ["residual_in_parts", "residual_with_cheap_features"])
def test_a_branch_that_ends_in_a_concatenation_is_named_as_one_that_stays_and_the_rest_can_go(name: str) -> None:
    torch.manual_seed(0)
    coupling = check(couple(capture(NETWORKS[name](), torch.randn(1, 1, 8, 8)))).coupling
    assert not coupling.blocks
    assert list(coupling.locked_blocks) == ["block:d"]
    assert not coupling.locked_groups
    assert {group.kind for group in coupling.open_groups()} == {"stream", "channel"}


def test_assertions_in_forward_keep_no_branch() -> None:
    torch.manual_seed(0)
    found = check(couple(capture(NETWORKS["asserted_residual"](), torch.randn(1, 1, 8, 8))))
    (block,) = found.coupling.blocks
    small, dense, x = (
        cut(found.coupling, {block.name: [0]}, found.sized),
        found.coupling.walk.captured.module,
        torch.randn(3, 1, 8, 8),
    )
    torch.testing.assert_close(answer(small, x), dense.h(torch.relu(dense.b(dense.a(x)))))


class Windowed(nn.Module):
    """A branch over windows of four of the eight tokens, which forward joins again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x[:, 0])
        windows = self.down(self.up(x.reshape(-1, 4, 16)).relu())
        x = x + windows.reshape(-1, 8, 16)
        return self.head(x.mean(1))


def test_a_branch_over_windows_can_go() -> None:
    torch.manual_seed(0)
    net = Windowed().eval()
    found = check(couple(capture(net, torch.randn(1, 1, 8, 8))))
    (block,) = found.coupling.blocks
    assert (block.full, block.shape) == (True, (4, 16))
    small, x = cut(found.coupling, {block.name: [0]}, found.sized), torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(answer(small, x), net.head(net.stem(x[:, 0]).mean(1)))


def test_a_branch_that_cannot_give_zero_stays_and_the_reason_is_said() -> None:
    coupling = check(couple(capture(Shifted().eval(), torch.randn(1, 1, 8, 8)))).coupling
    assert not coupling.blocks
    assert list(coupling.locked_blocks) == ["block:layer"]
    assert "zeros in its place" in coupling.locked_blocks["block:layer"]


class Mixing(nn.Module):
    """Branches over tokens and over channels by turns, all of one class; zero in place of one over tokens has no axes to swap."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.tokens = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(depth))
        self.channels = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x[:, 0])
        for tokens, channels in zip(self.tokens, self.channels, strict=True):
            x = x + tokens(x.transpose(1, 2)).transpose(1, 2)
            x = x + channels(x)
        return self.head(x.mean(1))


def test_branches_of_one_class_in_two_roles_are_not_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, real = [], sound_blocks.cut

    def counted(coupling: Coupling, plan: Plan, **how: bool) -> nn.Module:
        tried.append(len(plan))
        return real(coupling, plan, **how)

    monkeypatch.setattr(sound_blocks, "cut", counted)
    torch.manual_seed(0)
    coupling = couple(capture(Mixing().eval(), torch.randn(1, 1, 8, 8)))
    found = check(coupling).coupling
    assert [block.full for block in found.blocks] == [True] * 16
    assert tried == [16, 16]  # as they are, and in the form that does for all
    tried.clear()
    monkeypatch.setattr(sound_blocks, "FORMS", sound_blocks.FORMS[:1])
    found = check(coupling).coupling
    assert set(found.locked_blocks) == {f"block:tokens.{k}.2" for k in range(8)}
    assert tried == [16, 8, 1, 1, 8]  # halving a list of both tries dozens


class Steered(nn.Module):
    """Residual layers of two; forward reads a number from the first one's, and `broken` ones cannot give a single zero."""

    def __init__(self, depth: int = 6, broken: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.broken, self.stem, self.head = broken, nn.Linear(8, 8), nn.Linear(8, 3)
        self.ups, self.downs = (nn.ModuleList(nn.Linear(a, b) for _ in range(depth)) for a, b in ((8, 12), (12, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x[:, 0].mean(1)).to(self.ups[0].weight.dtype)
        for k, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            branch = down(up(x).relu())
            x = x + (branch.reshape(-1, 8) if k in self.broken else branch)
        return self.head(x)


def test_only_the_branch_that_forward_looks_at_keeps_its_layers() -> None:
    torch.manual_seed(0)
    found = check(couple(capture(Steered().eval(), torch.randn(1, 1, 8, 8)))).coupling
    assert [bool(block.unused) for block in found.blocks] == [True, *[False] * 5]
    small = cut(found, {block.name: [0] for block in found.blocks})
    assert [bool(list(layer.parameters())) for layer in (*small.ups, *small.downs)] == [True, *[False] * 11]


def test_what_fails_at_both_ends_of_three_says_nothing_about_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound_blocks, "FORMS", sound_blocks.FORMS[:1])  # a single zero alone
    torch.manual_seed(0)
    found = check(couple(capture(Steered(depth=3, broken=(2,)).eval(), torch.randn(1, 1, 8, 8)))).coupling
    assert [block.name for block in found.blocks] == ["block:downs.1"]


def test_a_forward_that_overwrites_its_input_locks_no_branch() -> None:
    class Overwriting(Steered):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(0.5).add_(1.0)
            return super().forward(x)

    torch.manual_seed(0)
    example = torch.randn(1, 1, 8, 8)
    captured = capture(Overwriting().eval(), example)
    before = [t.clone() for t in captured.example[0]]
    assert len(check(couple(captured)).coupling.blocks) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, captured.example[0], strict=True))


def test_a_branch_that_goes_takes_its_arithmetic_with_it() -> None:
    coupling = checked("packed").coupling
    first, second = coupling.blocks[:2]
    left = macs_left(coupling, {first.name: [0]})
    assert all(left[k] == 0 for k in first.operators)
    assert all(left[k] == coupling.walk.costs[k].macs > 0 for k in second.operators)
    assert macs_left(coupling, {}) == {k: cost.macs for k, cost in enumerate(coupling.walk.costs)}


def test_layers_after_a_branch_that_went_are_re_fit() -> None:
    found = checked("packed")
    dense, generator = found.coupling.walk.captured.module, torch.Generator().manual_seed(1)
    calibration, held_out = (torch.randn(n, 1, 8, 8, generator=generator).cumsum(2).cumsum(3) * 0.2 for n in (300, 200))
    plan = {found.coupling.blocks[0].name: [0]}
    expected = answer(dense, held_out)

    def lost(net: nn.Module) -> float:
        return float((answer(net, held_out) - expected).norm())

    solved = sequential(found.coupling, plan, found.sized, calibration)
    assert lost(solved) < 0.8 * lost(cut(found.coupling, plan, found.sized))
