"""One count of multiply-accumulates, of whatever operators a network's forward calls; figures by hand."""

from __future__ import annotations

from collections.abc import Callable

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.axes.coupling import couple
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.network.calling import Inputs
from edge_compress.pipeline.network.cost import cost_of
from networks import NETWORKS
from small_transformers import TRANSFORMERS
from torch import nn

TOKENS = torch.zeros(1, 6, 16)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


class Call(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[..., torch.Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x) if self.layer is None else self.function(x, self.layer)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x[..., : 4 * count].unflatten(-1, (count, 4)).transpose(1, 2)


COUNTS: dict[str, tuple[nn.Module, Inputs, int]] = {
    "a functional layer": (Call(lambda x: F.linear(x, torch.ones(5, 16))), TOKENS, 6 * 16 * 5),
    "a vector": (nn.Linear(16, 5), TOKENS[0, 0], 16 * 5),
    "a transposed convolution": (nn.ConvTranspose2d(4, 8, 2, 2, groups=2), torch.zeros(1, 4, 5, 5), 25 * 4 * 4 * 4),
    "a volume": (nn.Conv3d(2, 3, 3), torch.zeros(1, 2, 5, 5, 5), 27 * 3 * 2 * 27),
    "a product": (Call(lambda x: x @ x.transpose(1, 2)), TOKENS, 6 * 6 * 16),
    "a letter": (Call(lambda x: torch.einsum("bij,bkj->bik", x, x)), TOKENS, 6 * 6 * 16),
    "a matrix and a vector": (Call(lambda x: x[0] @ x[0, 0]), TOKENS, 6 * 16),
    "two vectors": (Call(lambda x: x[0, 1] @ x[0, 0]), TOKENS, 16),
    "fused attention": (Call(lambda x: F.scaled_dot_product_attention(*3 * (heads(x, 4),))), TOKENS, 2 * 4 * 36 * 4),
    "masked": (Call(lambda x: F.scaled_dot_product_attention(*3 * (heads(x, 4),), attn_mask=CAUSAL)), TOKENS, 2 * 4 * 36 * 4),
    "shared keys": (
        Call(lambda x: F.scaled_dot_product_attention(heads(x, 4), *2 * (heads(x, 2),), enable_gqa=True)),
        TOKENS,
        2 * 4 * 36 * 4,
    ),
    "nn.MultiheadAttention": (
        Call(lambda x, layer: layer(x, x, x)[0], nn.MultiheadAttention(16, 4, batch_first=True)),
        TOKENS,
        6 * 16 * 64 + 2 * 36 * 16,
    ),
    "an encoder": (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), TOKENS, 6 * 16 * 64 + 2 * 36 * 16 + 2 * 6 * 16 * 32),
    "LSTM": (nn.LSTM(16, 8, 2, batch_first=True, bidirectional=True), TOKENS, 6 * 2 * 32 * (16 + 8 + 16 + 8)),
    "GRU": (nn.GRU(16, 8, batch_first=True), TOKENS, 6 * 24 * (16 + 8)),
    "bilinear": (Call(lambda x, layer: layer(x, x), nn.Bilinear(16, 16, 3)), TOKENS, 6 * 16 * 16 * 3),
    "named": (nets.conv(3, 4), {"input": torch.zeros(1, 3, 8, 8)}, 64 * 4 * 27),
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_product_of_a_forward_pass_is_counted(name: str) -> None:
    module, inputs, macs = COUNTS[name]
    assert cost_of(module, inputs).macs == macs


def test_what_a_layer_computes_twice_is_counted_twice_and_its_parameters_once() -> None:
    layer = nn.Linear(16, 16)
    assert cost_of(nn.Sequential(layer, layer), TOKENS).macs == 2 * 6 * 256
    assert cost_of(nn.Sequential(layer, layer), TOKENS).params == 16 * 17


@pytest.mark.parametrize("name", [*NETWORKS, *TRANSFORMERS])
def test_the_count_is_that_of_the_walk_over_the_captured_network(name: str) -> None:
    torch.manual_seed(0)
    net, inputs = (NETWORKS | TRANSFORMERS)[name]().eval(), torch.randn(1, 1, 8, 8)
    captured = capture(net, inputs)
    assert cost_of(captured.module, inputs).macs == couple(captured).macs


def test_a_network_without_a_head_costs_less_than_with_it() -> None:
    torch.manual_seed(0)
    checked = nets.checked_of(TRANSFORMERS["torch_attention"]().eval(), (1, 8, 8))
    group = next(g for g in checked.coupling.paying_groups() if g.kind == "head")
    small = cut(checked.coupling, {group.name: [0]}, checked.sized)
    inputs = torch.randn(1, 1, 8, 8)
    assert cost_of(small, inputs).macs < cost_of(checked.coupling.walk.captured.module, inputs).macs
