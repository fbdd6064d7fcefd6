"""Ways of writing a network that must not lock its channels, and what is said of those that do."""

from __future__ import annotations

import dataclasses

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.graph.coupling import couple
from edge_compress.pipeline.graph.surgery import check_equivalence, prune
from edge_compress.pipeline.graph.trace import canonical
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.pattern.channels import Channels
from edge_compress.pipeline.types import Plan
from edge_compress.targets.base import Limits
from torch import nn


class OwnConv(nn.Conv2d):
    """A class of the user's that changes nothing."""


class Plain(nn.Module):
    """Two convolutions and a linear layer; subclasses write the way between them in other words."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nets.conv(3, 6), nets.conv(6, 8), nn.Linear(8, nets.CLASSES)

    def body(self, x):
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.body(x), 1), 1))


class FlattenByName(Plain):
    def forward(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.body(x), 1), start_dim=1))


class FlattenMethodByName(Plain):
    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.body(x), 1).flatten(start_dim=1))


class NoAffine(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6, affine=False)

    def body(self, x):
        return F.relu(self.b(F.relu(self.norm(self.a(x)))))


class Subclassed(Plain):
    def __init__(self):
        super().__init__()
        self.a, self.b = OwnConv(3, 6, 3, padding=1), OwnConv(6, 8, 3, padding=1)


class IdleDropout(Plain):
    def body(self, x):
        return F.dropout2d(super().body(x), 0.5, self.training)


class JoinedByName(Plain):
    def __init__(self):
        super().__init__()
        self.c = nets.conv(8, 4)
        self.fc = nn.Linear(12, nets.CLASSES)

    def body(self, x):
        y = super().body(x)
        return torch.cat(tensors=(y, F.relu(self.c(y))), dim=-3)


@pytest.mark.parametrize(
    "make", [Plain, FlattenByName, FlattenMethodByName, NoAffine, Subclassed, IdleDropout, JoinedByName], ids=lambda c: c.__name__
)
def test_every_inner_channel_can_be_removed_however_the_network_is_written(make):
    net = canonical(nets.drawn(make), nets.SHAPE)
    coupling = couple(net)
    assert {"a", "b"} <= {g.name for g in coupling.groups}
    assert coupling.prunable_macs_share == 1.0
    kept = {name: tuple(range(1, len(units), 2)) for name, units in coupling.units.items()}
    plan = Plan(Pattern.CHANNEL, "", kept)
    assert check_equivalence(net, coupling, plan, nets.SHAPE) < 1e-4
    assert prune(net, coupling, plan).get_submodule("a").out_channels == 3


def test_what_locks_channels_is_named_with_its_module_and_its_share():
    _, coupling = nets.subject("Normalised")
    found = {(lock.operation, lock.module): (lock.reason, lock.channels) for lock in coupling.locked}
    assert found["permute", ""] == ("no rule for it", 6)
    assert found["Linear", "up"] == ("a linear layer on tokens or maps", 10)
    total = coupling.prunable_macs_share + sum(lock.macs_share for lock in coupling.locked)
    assert total == pytest.approx(1.0)
    assert 0 < coupling.prunable_macs_share < 1


def test_a_run_says_how_much_can_be_pruned_and_what_keeps_the_rest():
    def channels(name: str) -> Channels:
        return Channels(nets.subject(name)[0], nets.SHAPE, Limits(1, (Precision.FP32,), (Pattern.CHANNEL,)), "magnitude", 0)

    whole = ("100% of the multiply-accumulates are in layers that get cheaper when channels are removed.",)
    assert channels("OptionA").remarks("any") == whole
    part = channels("Grouped")
    assert part.remarks("any") == (whole[0].replace("100%", "70%"),)
    part.coupling = dataclasses.replace(part.coupling, prunable_macs_share=0.3)
    assert "Conv2d in grouped keeps 30% of them and 14 channels: a grouped convolution, groups=2." in part.remarks("any")
