"""Structures of units as widths of layers, for targets whose files are cut layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import nets
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.cutting.gate import Checked
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.evaluate.unit_prober import by_layer, macs_left
from edge_compress.pipeline.network.modes import attention_in_steps
from edge_compress.targets.base import Structure
from small_transformers import TRANSFORMERS
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Upsampled(nn.Module):
    """Convolutions with groups, depthwise and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depthwise = nets.conv(3, 8), nets.conv(8, 16, groups=8)
        self.up, self.up_in_groups = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2, groups=4)
        self.grouped, self.fc = nets.conv(8, 12, groups=2), nn.Linear(12, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.depthwise(F.relu(self.a(x))))
        return self.fc(F.relu(self.grouped(F.relu(self.up_in_groups(F.relu(self.up(x)))))).mean((2, 3)))


def counted(module: nn.Module, inputs: torch.Tensor) -> int:
    """The multiply-accumulates that PyTorch counts while a module runs."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), attention_in_steps(), sdpa_kernel(SDPBackend.MATH), counter:
        module(inputs)
    return counter.get_total_flops() // 2


def thirds(checked: Checked) -> list[dict[str, list[int]]]:
    """Plans without a third of the units of one group, and of all groups at once."""
    each = {g.name: list(range(0, len(g.units), 3)) for g in checked.coupling.paying_groups() if len(g.units) > 1}
    return [*({name: units} for name, units in each.items()), each]


@pytest.mark.parametrize("make", [*nets.NETS.values(), Upsampled], ids=lambda make: make.__name__)
def test_macs_left_of_convolutions_are_those_of_the_network_really_cut(make: Callable[[], nn.Module]) -> None:
    checked = nets.checked_of(nets.drawn(make))
    for plan in thirds(checked):
        small = cut(checked.coupling, plan, checked.sized).eval()
        assert sum(macs_left(checked.coupling, plan).values()) == counted(small, nets.images(1)), plan


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_macs_left_of_attention_are_those_of_the_network_really_cut(name: str) -> None:
    torch.manual_seed(0)
    checked = nets.checked_of(TRANSFORMERS[name]().eval(), (1, 8, 8))
    for plan in thirds(checked):
        small = cut(checked.coupling, plan, checked.sized).eval()
        assert sum(macs_left(checked.coupling, plan).values()) == counted(small, torch.randn(1, 1, 8, 8)), plan


def test_a_removed_block_takes_all_of_its_attention_with_it() -> None:
    torch.manual_seed(0)
    checked = nets.checked_of(TRANSFORMERS["packed"]().eval(), (1, 8, 8))
    assert [block for block in checked.coupling.blocks if "attns" in block.name]
    for block in checked.coupling.blocks:
        small = cut(checked.coupling, {block.name: [0]}, checked.sized).eval()
        assert sum(macs_left(checked.coupling, {block.name: [0]}).values()) == counted(small, torch.randn(1, 1, 8, 8))


def test_layers_that_lose_channels_are_named_with_what_they_keep() -> None:
    coupling = nets.checked("OptionA").coupling
    found = by_layer(coupling, Structure({"layer2.0.conv1": (6, 8), "layer3.0.conv2": (4, 12)}, ("block:layer2.1.conv2",)))
    assert found.removed == ("layer2.1.conv2",)
    assert found.widths["layer2.0.conv1"] == (4, 6)
    assert found.widths["layer2.0.conv2"] == (6, 8)
    assert found.widths["layer3.0.shortcut_0"] == (8, 4)
    assert found.widths["linear"] == (4, nets.CLASSES)
    assert not [name for name in found.widths if name.startswith(("layer1", "layer2.1", "conv1"))]


def test_a_depthwise_convolution_keeps_as_many_inputs_as_outputs() -> None:
    coupling = nets.checked("Mobile").coupling
    found = by_layer(coupling, Structure({"blocks.0.expand.0": (5, 8)}))
    assert sorted(found.widths.values()) == sorted([(5, 5), (found.widths["blocks.0.expand.0"][0], 5), (5, 6)])


def test_groups_of_a_grouped_convolution_are_not_numbers_of_channels() -> None:
    coupling = nets.checked("Grouped").coupling
    (group,) = [g for g in coupling.paying_groups() if g.kind == "group"]
    with pytest.raises(BuildError, match="a grouped convolution"):
        by_layer(coupling, Structure({group.name: (1, len(group.units))}))
