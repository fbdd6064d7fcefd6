"""Which way a network is pruned: by torch.fx where it understands the network, else by torch.export."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import user_net
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.compute import CPU
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.pattern.channels import Channels
from edge_compress.pipeline.pattern.choice import pruning_for
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.x86 import TARGET
from torch import nn


def chosen(module: nn.Module, tmp_path) -> object:
    config = Config(("x86",), out=tmp_path)
    signature = image_signature((1, 8, 8), 10)
    loaded = SimpleNamespace(module=module.eval(), example=torch.rand(1, 1, 8, 8), subject=SimpleNamespace(signature=signature))
    return pruning_for(Pattern.CHANNEL, loaded, TARGET.limits, config, lambda: None, tmp_path, CPU)


@pytest.mark.parametrize(("factory", "way"), [("projected", Channels), ("attending", Units), ("shared", Units)])
def test_a_network_that_cannot_be_traced_or_shares_layers_is_captured_whole(factory: str, way: type, tmp_path) -> None:
    found = chosen(getattr(user_net, factory)(), tmp_path)
    assert type(found) is way
    assert found.knobs


def test_a_network_that_neither_can_capture_is_refused_with_the_line(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="depends on the values") as refused:
        chosen(user_net.branching(), tmp_path)
    assert "x.sum() > 0" in str(refused.value)
    assert capfd.readouterr() == ("", "")  # torch would print the graph


def test_a_network_of_which_nothing_can_go_is_refused_in_the_words_of_layers(tmp_path) -> None:
    with pytest.raises(InputError, match="layer only"):
        chosen(user_net.single(), tmp_path)
