"""How a network is pruned: by units, or by masks of connections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import user_net
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.compute import CPU
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.pattern.base import Pruning
from edge_compress.pipeline.pattern.choice import pruning_for
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import Plan
from edge_compress.targets.x86 import TARGET
from torch import nn


def chosen(module: nn.Module, tmp_path, pattern: Pattern = Pattern.CHANNEL) -> Pruning:
    config = Config(("x86",), out=tmp_path)
    signature = image_signature((1, 8, 8), 10)
    loaded = SimpleNamespace(module=module.eval(), example=torch.rand(1, 1, 8, 8), subject=SimpleNamespace(signature=signature))
    return pruning_for(pattern, loaded, TARGET.limits, config, lambda: None, tmp_path, CPU)


@pytest.mark.parametrize("factory", ["projected", "padded", "attending", "shared"])
def test_networks_of_every_make_are_pruned_by_units(factory: str, tmp_path) -> None:
    found = chosen(getattr(user_net, factory)(), tmp_path)
    assert type(found) is Units
    assert found.knobs
    assert found.by_saliency == (factory == "attending")


class Shuffled(nn.Module):
    """Channel shuffle by view: its constants say how many channels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x).relu()).relu()
        x = x.view(x.shape[0], 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.d(self.c(x).relu().mean((2, 3)))


class Resized(nn.Module):
    """Interpolation to a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        return self.c((y + F.interpolate(self.b(y), size=y.shape[-2:], mode="bilinear")).mean((2, 3)))


@pytest.mark.parametrize("kind", [Shuffled, Resized])
def test_what_holds_sizes_runs_without_most_of_its_units(kind: type, tmp_path) -> None:
    found = chosen(kind(), tmp_path)
    plan = Plan(Pattern.CHANNEL, "", {k.name: tuple(range(k.kept[-1])) for k in found.knobs if k.kind != "block"})
    with torch.no_grad():
        assert found.blank(plan)(torch.rand(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("fold", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("pattern", [Pattern.CHANNEL, Pattern.WEIGHT])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_computed_at_every_call_are_folded_for_every_pattern_and_that_is_said(fold, pattern, tmp_path) -> None:
    layers = (fold(nn.Conv2d(1, 16, 3)), nn.ReLU(), fold(nn.Conv2d(16, 16, 3)), nn.ReLU())
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    found = chosen(net, tmp_path, pattern)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(found.net(x), net.eval()(x), atol=1e-5)
    folded = [remark.partition(":")[0] for remark in found.remarks("onnxruntime") if remark.endswith("folded into weight")]
    assert folded == ["0", "2"]  # two layers: tensors that are computed at every call must not be taken for shared ones
    assert {"0", "2"} <= {knob.name for knob in found.knobs}


def test_a_network_that_cannot_be_captured_is_refused_with_the_line(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="depends on the values") as refused:
        chosen(user_net.branching(), tmp_path)
    assert "x.sum() > 0" in str(refused.value)
    assert capfd.readouterr() == ("", "")  # torch would print the graph


def test_a_network_of_which_nothing_can_go_is_refused_by_what_keeps_it(tmp_path) -> None:
    with pytest.raises(InputError, match="conv2d in only: output of the network"):
        chosen(user_net.single(), tmp_path)
