"""Every small network is pruned so that cutting equals zeroing, or what stays is said truly."""

from __future__ import annotations

import pytest
import torch
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.axes.coupling import couple
from edge_compress.pipeline.axes.cutting.comparison import relative_difference
from edge_compress.pipeline.axes.cutting.gate import check, half
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.axes.inspect import Inspection, inspect
from networks import NETWORKS
from small_transformers import TRANSFORMERS
from torch import nn

ALL = {**NETWORKS, **{f"transformer_{k}": v for k, v in TRANSFORMERS.items()}}
LOCKED = {  # layer a stays, and this operator is why
    "spatial_attention": "mean",
    "softmax_over_channels": "softmax",
    "local_response_norm": "avg_pool3d",
    "group_norm_of_one_group": "group_norm",
    "eca_gate": "conv1d",
}


def look(name: str) -> Inspection:
    torch.manual_seed(0)
    return inspect(ALL[name](), torch.randn(1, 1, 8, 8), name=name)


@pytest.mark.parametrize("name", ALL)
def test_cut_is_zeroed(name: str) -> None:
    found = look(name)
    assert found.equivalence.passed
    assert found.equivalence.tried
    assert found.checked is not None
    assert not found.checked.coupling.locked_groups
    if name in LOCKED:
        assert any(LOCKED[name] in x.reason for x in found.locked)
    elif not name.startswith("transformer"):
        assert found.prunable_macs_share == pytest.approx(1.0)
    else:
        assert found.prunable_macs_share > (0.7 if "encoder" not in name else 0.4)


@pytest.mark.parametrize("name", [k for k in TRANSFORMERS if k != "encoder_layer"])
def test_heads_and_hidden_units_are_found(name: str) -> None:
    kinds = {g.kind for g in look(f"transformer_{name}").groups}
    assert {"head", "mlp"} <= kinds


def test_the_cut_module_is_the_users_own_and_exports_again() -> None:
    torch.manual_seed(0)
    net, x = TRANSFORMERS["packed"](), torch.randn(1, 1, 8, 8)
    before = [p.clone() for p in net.parameters()]
    checked = check(couple(capture(net, x)))
    plan = {g.name: half(g) for g in checked.coupling.open_groups()}
    small = cut(checked.coupling, plan, checked.sized)
    assert type(small) is type(net)
    assert small.attns[0].num_heads == 2
    assert small.mlps[0][0].out_features == 32
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    again = torch.export.export(small, (x,), strict=False).module()
    assert relative_difference([again(x)["logits"]], [small(x)["logits"]]) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    small.train()(x)["logits"].sum().backward()


def test_corrected_sizes_follow_the_batch_and_train() -> None:
    torch.manual_seed(0)
    net = TRANSFORMERS["packed_sizes_from_input"]()
    checked = check(couple(capture(net, torch.randn(1, 1, 8, 8))))
    assert set(checked.sized) == {"attns.0", "attns.1"}
    small = cut(checked.coupling, {g.name: half(g) for g in checked.coupling.open_groups()}, checked.sized)
    assert isinstance(small.attns[0], type(net.attns[0]))
    assert small.train()(torch.randn(3, 1, 8, 8))["logits"].shape == (3, 10)


def test_a_cut_network_with_synchronised_batch_norm_trains_on_one_device() -> None:
    torch.manual_seed(0)
    found = look("synchronised_batch_norm").checked
    assert found is not None
    small = cut(found.coupling, {g.name: half(g) for g in found.coupling.open_groups()}, found.sized).train()
    before = small.n.running_mean.clone()
    small(torch.randn(5, 1, 8, 8)).square().sum().backward()
    assert before.shape == (8,)
    assert not torch.equal(small.n.running_mean, before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_what_breaks_synchronised_batch_norm_in_training_is_not_passed_over() -> None:
    class Fixed(nn.SyncBatchNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if self.training and input.shape[1] != 16:
                raise ValueError("sixteen channels")
            return super().forward(input)

    torch.manual_seed(0)
    net = NETWORKS["synchronised_batch_norm"]()
    net.n = Fixed(16)
    coupling = check(couple(capture(net, torch.randn(1, 1, 8, 8)))).coupling
    assert "in training mode, sixteen channels" in coupling.locked_groups["a"]


def test_blocks_hold_their_groups() -> None:
    coupling = couple(capture(TRANSFORMERS["packed"](), torch.randn(1, 1, 8, 8)))
    assert [b.name for b in coupling.blocks] == ["block:attns.0.proj", "block:mlps.0.3", "block:attns.1.proj", "block:mlps.1.3"]
    assert coupling.blocks[0].groups == ("attns.0.qkv:head", "attns.0.qkv:head_dim")
    assert coupling.blocks[1].groups == ("mlps.0.0",)


def test_channels_of_a_stream_and_within() -> None:
    found = look("residual_with_dropout")
    assert [(g.name, g.kind, g.units) for g in found.groups] == [("a", "stream", 16), ("b", "channel", 16)]


def test_a_stream_behind_stochastic_depth_can_be_pruned() -> None:
    assert [(g.name, g.kind, g.units) for g in look("stochastic_depth").groups] == [("a", "stream", 16)]


@pytest.mark.parametrize("name", ["squeeze_excite", "squeeze_excite_linear", "squeeze_excite_view"])
def test_channels_that_a_gate_scales_lie_within_and_are_no_stream(name: str) -> None:
    kinds = {g.name: g.kind for g in look(name).groups}
    assert kinds["a"] == "channel"
    assert "stream" not in kinds.values()


class Mixed(nn.Module):
    """An operator without a rule between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.f = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(
            torch.linalg.matrix_exp(self.a(x).mean((2, 3))[:, :, None] * self.a(x).mean((2, 3))[:, None])[:, :, :1, None].expand(
                -1, -1, 5, 5
            )
        )
        return self.f(self.c(x).mean((2, 3)))


def test_an_unknown_operator_is_the_reason() -> None:
    found = inspect(Mixed(), torch.randn(1, 1, 8, 8))
    assert {g.name for g in found.groups} == {"b", "c"}
    assert found.locked[0].module == "a"
    assert "linalg_matrix_exp" in found.locked[0].reason
    assert 0 < found.locked[0].macs_share < 1


@pytest.mark.parametrize("name", ["rms_norm_narrow", "rms_norm_written_out", "rms_norm_around_zero"])
def test_the_residual_width_of_an_rms_norm_network_can_be_cut(name: str) -> None:
    found = look(f"transformer_{name}")
    (stream,) = (group for group in found.groups if group.kind == "stream")
    assert stream.units == 32
    assert found.checked is not None
    coupling = found.checked.coupling
    small = cut(coupling, {stream.name: list(range(0, 32, 4))}, found.checked.sized)
    assert small.head.weight.shape == (10, 24)


class OneOfTwo(nn.Module):
    """Either hidden layer may be narrower, but not both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.a.weight.shape[0] < 32 and self.c.weight.shape[0] < 24:
            raise ValueError("both are narrow")
        x = x + self.b(self.a(x).relu())
        return x + self.d(self.c(x).relu())


def test_of_groups_that_fail_only_together_those_that_can_go_stay_open() -> None:
    torch.manual_seed(0)
    found = inspect(OneOfTwo(), torch.randn(1, 16), name="one of two")
    assert found.equivalence.passed
    assert found.checked is not None
    coupling = found.checked.coupling
    assert [group.name for group in coupling.open_groups()] == ["a"]
    assert coupling.locked_groups["c"].startswith("beside others that can be removed, forward holds sizes: both are narrow")


def test_json_is_the_public_contract() -> None:
    plain = look("plain").to_json()
    keys = {
        "model",
        "captured",
        "parameters",
        "macs",
        "prunable_macs_share",
        "groups",
        "locked",
        "equivalence",
        "seconds",
        "notes",
    }
    assert set(plain) == keys
    assert plain["groups"][0] == {"name": "a", "kind": "channel", "units": 16, "macs_share": pytest.approx(1.0, abs=0.01)}
    assert set(plain["equivalence"]) == {"tried", "largest_relative_difference", "passed"}
