"""Which residual branches can be removed, which groups lie inside them, and what keeps the others."""

from __future__ import annotations

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from edge_compress.pipeline.graph.coupling import couple
from edge_compress.pipeline.graph.knobs import knobs_for, plan_for
from edge_compress.pipeline.graph.surgery import check_equivalence
from edge_compress.pipeline.graph.trace import canonical
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.search import knapsack
from edge_compress.pipeline.search import problem as search_problem
from edge_compress.pipeline.search.latency_model import LatencyModel
from edge_compress.pipeline.types import Plan
from edge_compress.targets.base import Limits
from torch import nn

LIMITS = Limits(8, (Precision.FP32,), (Pattern.CHANNEL,))


class ListedBranches(nn.Module):
    """Residual branches whose layers all lie in one list: names say nothing about which belong together."""

    def __init__(self):
        super().__init__()
        self.stem = nets.conv(3, 16)
        self.convs = nn.ModuleList(nets.conv(16, 16) for _ in range(6))
        self.fc = nn.Linear(16, nets.CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for i in range(0, 6, 2):
            x = F.relu(x + self.convs[i + 1](F.relu(self.convs[i](x))))
        return self.fc(x.mean((2, 3)))


def test_a_removed_block_leaves_the_groups_of_other_blocks_in_the_same_list():
    coupling = couple(canonical(nets.drawn(ListedBranches), nets.SHAPE))
    assert {b.name: b.groups for b in coupling.blocks.values()} == {f"block:convs.{i + 1}": (f"convs.{i}",) for i in (0, 2, 4)}
    knobs = knobs_for(coupling, LIMITS)
    levels = tuple(1 if k.name in ("block:convs.1", "convs.2", "convs.4") else 0 for k in knobs)
    assert search_problem.canonical(knobs, levels) == levels
    plan = plan_for(knobs, levels, {g.name: tuple(range(g.size)) for g in coupling.groups}, "")
    assert set(plan.kept) == {"convs.2", "convs.4"}


@pytest.mark.parametrize(
    ("name", "blocks"), [("mobilenet_v3_small", 6), ("efficientnet_b0", 9), ("regnet_y_400mf", 16), ("resnet18", 8)]
)
def test_plans_of_the_knapsack_are_within_budget_by_their_own_table(name, blocks):
    """What is inside a removed block is not saved twice, however the layers are called."""
    net = canonical(torchvision.models.get_model(name, weights=None, num_classes=10), (3, 64, 64))
    coupling = couple(net)
    knobs = knobs_for(coupling, LIMITS)
    assert len(coupling.blocks) == blocks
    assert all(block.groups for block in coupling.blocks.values())
    single = {
        (i, level): 0.02 * (1 - k.kept[level] / k.size) * (1.5 if k.kind == "block" else 1)
        for i, k in enumerate(knobs)
        for level in range(1, len(k.kept))
    }

    def estimate(levels):
        inside = {
            g
            for k, level in zip(knobs, levels, strict=True)
            if k.kind == "block" and level
            for g in coupling.blocks[k.name].groups
        }
        saved = sum(single[i, lv] for i, (k, lv) in enumerate(zip(knobs, levels, strict=True)) if lv and k.name not in inside)
        return max(1 - saved, 0.05)

    fastest = estimate(tuple(len(k.kept) - 1 if k.kind != "block" else 0 for k in knobs))
    budget = (1 + fastest) / 2
    model = LatencyModel(knobs, estimate, search_problem.SearchSettings("knapsack", 10, budget))
    rng = np.random.default_rng(0)
    for _ in range(30):
        loss = tuple(np.maximum.accumulate(np.r_[0, rng.random(len(k.kept) - 1) * 0.1]) for k in knobs)
        levels = knapsack.solve(knobs, loss, model.rows(), model.dense - budget)
        assert levels is not None
        assert estimate(levels) <= budget + 1e-6


def test_gated_expansions_are_inner_and_stochastic_depth_locks_nothing():
    net = canonical(torchvision.models.efficientnet_b0(weights=None, num_classes=10), (3, 64, 64))
    coupling = couple(net)
    kinds = {g.name: g.kind for g in coupling.groups}
    gated = [g for g in coupling.groups if g.kind != "block" and any("fc2" in p for p in g.producers)]
    assert len(gated) == 16
    assert {g.kind for g in gated} == {"inner"}
    assert sum(kind == "coupled" for kind in kinds.values()) == 5
    assert coupling.prunable_macs_share > 0.99


class Gated(nn.Module):
    """A branch that ends in x * sigmoid(x), added on the left or on the right."""

    first = True

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.bn = nets.conv(3, 6), nets.conv(6, 6), nets.conv(6, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, nets.CLASSES)

    def forward(self, x):
        x = self.a(x)
        y = self.bn(self.c(torch.relu(self.b(x))))
        y = y * torch.sigmoid(y)
        return self.fc((y + x if self.first else x + y).mean((2, 3)))


class GatedRight(Gated):
    first = False


@pytest.mark.parametrize("make", [Gated, GatedRight])
def test_the_branch_is_what_only_the_addition_reads(make):
    net = canonical(nets.drawn(make), nets.SHAPE)
    coupling = couple(net)
    assert coupling.blocks["block:c"].layers == ("b", "c")
    assert check_equivalence(net, coupling, Plan(Pattern.CHANNEL, "", {}, ("block:c",)), nets.SHAPE) < 1e-4


class Scaled(nn.Module):
    """One addition that scales its second operand, and one that does not."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nets.conv(i, 6) for i in (3, 6, 6))
        self.fc = nn.Linear(6, nets.CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(torch.add(self.a(x), x, alpha=2))
        return self.fc(F.relu(torch.add(input=self.b(x), other=x)).mean((2, 3)))


class Joined(nn.Module):
    """A branch that ends in a concatenation, as in GhostNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nets.conv(3, 6), nets.conv(6, 3), nets.conv(3, 3)
        self.fc = nn.Linear(6, nets.CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.a(x))
        return self.fc((x + torch.cat([y, self.b(y)], dim=1)).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "stays", "why", "removable"),
    [(Scaled, "block:a", "scales an operand", ["block:b"]), (Joined, "block:b", "does not end in one layer", [])],
)
def test_a_branch_that_cannot_be_removed_is_named_and_the_rest_goes_on(make, stays, why, removable):
    net = canonical(nets.drawn(make), nets.SHAPE)
    coupling = couple(net)
    assert list(coupling.blocks) == removable
    assert why in coupling.locked_blocks[stays]
    kept = {name: tuple(range(0, len(units), 2)) for name, units in coupling.units.items()}
    assert check_equivalence(net, coupling, Plan(Pattern.CHANNEL, "", kept, tuple(removable)), nets.SHAPE) < 1e-4
