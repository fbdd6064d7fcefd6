"""Attention divides by the root of its dimensions: where some go, the factor is in the projection that nothing else reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.capture import capture, run
from edge_compress.pipeline.axes.coupling import couple
from edge_compress.pipeline.axes.cutting.comparison import relative_difference
from edge_compress.pipeline.axes.cutting.gate import Checked, check
from edge_compress.pipeline.axes.cutting.surgery import cut, zeroed
from torch import nn

TOKENS, HEADS, DEPTH = 6, 3, 4
WIDTH = HEADS * DEPTH


class Positioned(nn.Module):
    """Attention with a bias of relative positions computed from queries, as in SAM, from keys, or from both."""

    def __init__(self, *, queries: bool, keys: bool, packed: bool = True) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH) if packed else nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.positions = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(TOKENS, DEPTH))
        self.queries, self.keys = queries, keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if isinstance(self.qkv, nn.Linear):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.qkv)
        bias = q @ self.positions.T if self.queries else torch.zeros(TOKENS, TOKENS)
        bias = bias + (k @ self.positions.T).transpose(2, 3) if self.keys else bias
        return self.fc(self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)))


class OneProjection(nn.Module):
    """Queries and keys are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.qk, self.v = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.out = nn.Linear(8, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, v = self.qk(x)[:, None], self.v(x)[:, None]
        return self.fc(self.out(F.scaled_dot_product_attention(q, q, v)[:, 0]))


def checked(net: nn.Module) -> Checked:
    return check(couple(capture(net.eval(), torch.randn(2, TOKENS, 5, generator=torch.Generator().manual_seed(0)))))


def difference(found: Checked, plan: dict[str, list[int]]) -> float:
    """Between the network cut and the network with zeros."""
    example = found.coupling.walk.captured.example
    small, masked = cut(found.coupling, plan, found.sized).eval(), zeroed(found.coupling, plan)
    return relative_difference(run(small, example), run(masked, example, in_steps=True))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("queries", "keys", "rows"), [(False, False, 0), (True, False, 1), (False, True, 0)])
def test_the_factor_is_in_the_projection_that_only_attention_reads(queries: bool, keys: bool, rows: int, packed: bool) -> None:
    torch.manual_seed(0)
    found = checked(Positioned(queries=queries, keys=keys, packed=packed))
    (group,) = [g for g in found.coupling.open_groups() if g.kind == "head_dim"]
    assert difference(found, {group.name: [1]}) < 1e-4
    (made,) = found.coupling.walk.rescales
    assert made.parameters[0] == ("qkv.weight" if packed else f"qkv.{rows}.weight")
    assert made.rows == tuple(range(rows * WIDTH, (rows + 1) * WIDTH) if packed else range(WIDTH))


@pytest.mark.parametrize(
    "make",
    [lambda: Positioned(queries=True, keys=True), lambda: Positioned(queries=True, keys=True, packed=False), OneProjection],
)
def test_dimensions_stay_where_both_projections_are_read_elsewhere(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    coupling = couple(capture(make().eval(), torch.randn(2, TOKENS, 5)))
    assert not coupling.walk.rescales
    assert not [g for g in coupling.open_groups() if g.kind == "head_dim"]
