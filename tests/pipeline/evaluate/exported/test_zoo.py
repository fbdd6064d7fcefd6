"""Networks as they are published, with random weights: nearly all of each can go, in the module and in its exported graph."""

from __future__ import annotations

import pytest
import torch
from edge_compress.pipeline.axes.cutting.gate import enlivened
from edge_compress.pipeline.axes.inspect import inspect
from edge_compress.pipeline.evaluate.exported.unit_graph import UnitGraph
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.x86 import TARGET as X86
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # of the libraries, on how they make networks

SIZE = 64


def made(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    torch.manual_seed(0)
    if library == "torchvision":
        net: nn.Module = pytest.importorskip("torchvision").models.get_model(model, weights=None)
        return net
    sized = {"img_size": SIZE} if model.startswith("vit") else {}
    net = pytest.importorskip("timm").create_model(model, pretrained=False, **sized)
    return net


@pytest.mark.parametrize(
    ("name", "share", "blocks"),
    [
        ("torchvision:shufflenet_v2_x0_5", 0.99, 0),  # channel shuffle by view
        ("timm:ghostnet_050", 0.99, 16),  # branches that end in a concatenation, BatchNorm by its function
        ("timm:fastvit_t8", 0.99, 24),  # assertions in forward, branches that can be fused
        ("timm:mobilenetv4_conv_small_035", 0.99, 10),
        ("timm:mobilenetv3_small_050", 0.99, 7),
        ("timm:efficientnetv2_rw_t", 0.99, 34),  # deep
        ("timm:ecaresnet26t", 0.85, 8),
        ("timm:poolformerv2_s12", 0.85, 12),
        ("timm:vit_tiny_patch16_224", 0.95, 24),
    ],
)
def test_published_networks_are_pruned_and_their_graphs_cut(name: str, share: float, blocks: int) -> None:
    found = inspect(made(name).eval(), torch.randn(1, 3, SIZE, SIZE), name=name)
    assert found.equivalence.passed
    assert found.prunable_macs_share > share
    checked = found.checked
    assert checked is not None
    coupling = checked.coupling
    assert (len(coupling.blocks), coupling.locked_groups) == (blocks, {})
    with enlivened(coupling.walk.captured.module):
        signature = image_signature((3, SIZE, SIZE), 1000)
        UnitGraph(checked, X86.prober(coupling.walk.captured.module, signature, Precision.FP32).network).require_branches()
