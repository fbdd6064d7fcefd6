"""Structures of units as widths of layers, for targets whose files are cut layer by layer."""

from __future__ import annotations

import nets
import pytest
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.evaluate.unit_prober import by_layer
from edge_compress.targets.base import Structure


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
