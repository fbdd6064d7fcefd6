from __future__ import annotations

import gc

import pytest
import torch
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.onnx import export, exporter_cache
from edge_compress.targets.onnx.export import export_float
from torch import nn

SIGNATURE = image_signature((3, 6, 6))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x) * self.scale).mean((2, 3))


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    done: list[nn.Module] = []
    whole = export.export_graph

    def counted(module, *arguments, **options):
        done.append(module)
        return whole(module, *arguments, **options)

    monkeypatch.setattr(export, "export_graph", counted)
    return done


def test_the_same_network_is_exported_once_and_editing_its_graph_does_not_reach_the_next_copy(exports):
    net = Scaled().eval()
    first = export_float(net, SIGNATURE)
    whole = first.SerializeToString(deterministic=True)
    del first.graph.node[:]
    assert export_float(net, SIGNATURE).SerializeToString(deterministic=True) == whole
    assert len(exports) == 1


@pytest.mark.parametrize("change", ["a weight", "a buffer that is not saved", "a hyperparameter", "the signature"])
def test_a_changed_network_is_exported_again(exports, change):
    net, signature = Scaled().eval(), SIGNATURE
    before = export_float(net, signature).SerializeToString(deterministic=True)
    with torch.no_grad():
        if change == "a weight":
            net.conv.weight[0, 0, 0, 0] += 1.0
        elif change == "a buffer that is not saved":
            net.scale.mul_(3.0)
        elif change == "a hyperparameter":
            net.conv.stride = (2, 2)
        else:
            signature = image_signature((3, 8, 8))
    assert export_float(net, signature).SerializeToString(deterministic=True) != before
    assert len(exports) == 2


def test_another_network_at_the_same_address_is_exported(exports):
    for _ in range(3):
        export_float(Scaled().eval(), SIGNATURE)
        gc.collect()
    assert len(exports) == 3
    assert not exporter_cache._kept.keys() & {id(module) for module in exports}


def test_a_large_network_is_not_kept(exports, monkeypatch):
    monkeypatch.setattr(exporter_cache, "LARGEST_BYTES", 100)
    net = Scaled().eval()
    export_float(net, SIGNATURE)
    export_float(net, SIGNATURE)
    assert len(exports) == 2


def test_the_exporter_collects_its_operators_once(monkeypatch):
    library = pytest.importorskip("torch.onnx._internal.exporter._registration").onnxscript_apis
    export_float(Scaled().eval(), SIGNATURE)
    collected = library.get_torchlib_ops.cache_info().misses
    export_float(Scaled().eval(), SIGNATURE)
    assert library.get_torchlib_ops.cache_info().misses == collected == 1
