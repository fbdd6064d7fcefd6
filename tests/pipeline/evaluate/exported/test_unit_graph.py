"""Graphs cut from one export are the networks that cutting the module gives; what cannot be cut is refused, never wrong."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edge_compress.pipeline.axes.capture import capture, run
from edge_compress.pipeline.axes.coupling import Plan, couple
from edge_compress.pipeline.axes.cutting.comparison import relative_difference
from edge_compress.pipeline.axes.cutting.gate import Checked, check, enlivened
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.evaluate import unit_prober
from edge_compress.pipeline.evaluate.exported import ties, unit_graph
from edge_compress.pipeline.evaluate.exported.unit_graph import UnitGraph
from edge_compress.pipeline.evaluate.unit_prober import UnitProber
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.signature import Signature, TensorSpec
from edge_compress.targets.base import Structure
from edge_compress.targets.onnx.graph import Graph
from edge_compress.targets.onnx.prober import OnnxProber
from edge_compress.targets.x86 import TARGET as X86
from networks import NETWORKS
from small_transformers import TRANSFORMERS
from torch import Tensor, nn

SMALL = {
    name: {**NETWORKS, **TRANSFORMERS}[name]
    for name in (
        "batch_norm_without_affine",
        "batch_norm_as_a_function",
        "batch_norm_as_a_function_without_bias_before",
        "chunk_as_gate",
        "grouped",
        "depthwise_with_multiplier",
        "group_norm",
        "packed",
        "windows",
    )
}


SIZED = {  # forwards and operators that hold sizes, and what an exporter could trip over
    name: NETWORKS[name]
    for name in (
        "synchronised_batch_norm",
        "asserted_residual",
        "residual_in_parts",
        "residual_with_cheap_features",
        "upsampled_sum",
        "token_mixing",
        "channel_shuffle",
        "channel_shuffle_by_view",
        "pixel_unshuffle",
        "squeeze_excite_view",
    )
}


class Residual(nn.Module):
    """Two branches with BatchNorm, added to their shortcut before and after an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 10)
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.first(x)).relu()
        return self.head((x + self.second(x)).mean((2, 3)))


class ChannelsLast(nn.Module):
    """ConvNeXt's blocks: depthwise convolution, then LayerNorm and MLP on the channels as last axis, scaled and permuted back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 10)
        self.spatial = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.rand(16, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for spatial, mlp in zip(self.spatial, self.mlps, strict=True):
            x = x + mlp(spatial(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * self.scale
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """torchvision's blocks: additions and activations that overwrite what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.relu = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 10), nn.ReLU(inplace=True)
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(16, 24, 3, padding=1),
                nn.BatchNorm2d(24),
                nn.ReLU(inplace=True),
                nn.Conv2d(24, 16, 1),
                nn.BatchNorm2d(16),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for branch in (self.first, self.second):
            y = branch(x)
            y += x
            x = self.relu(y)
        return self.head(x.mean((2, 3)))


RESIDUAL = {"residual": Residual, "channels last": ChannelsLast, "in place": InPlace}


def checked_of(module: nn.Module) -> Checked:
    torch.manual_seed(0)
    return check(couple(capture(module.eval(), torch.randn(1, 1, 8, 8))))


def signature_of(checked: Checked) -> Signature:
    captured = checked.coupling.walk.captured
    outputs = (
        TensorSpec(f"output_{k}", tuple(t.shape[1:]), "float32") for k, t in enumerate(run(captured.module, captured.example))
    )
    return Signature((TensorSpec("pixels", (1, 8, 8), "float32"),), tuple(outputs))


def graph_of(checked: Checked, precision: Precision = Precision.FP32) -> tuple[OnnxProber, UnitGraph]:
    prober = X86.prober(checked.coupling.walk.captured.module, signature_of(checked), precision)
    return prober, UnitGraph(checked, prober.network)


def drawn(checked: Checked, seed: int = 0) -> Plan:
    """Some units of every group, not the first ones, and every other branch."""
    rng = np.random.default_rng(seed)
    groups = {
        g.name: sorted(rng.choice(len(g.units), len(g.units) // 2, replace=False).tolist())
        for g in checked.coupling.paying_groups()
    }
    return groups | {b.name: [0] for b in checked.coupling.blocks[::2]}


def answered(file: bytes, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@pytest.mark.parametrize("name", [*SMALL, *SIZED, *RESIDUAL])
def test_a_cut_graph_answers_as_the_cut_module(name: str) -> None:
    torch.manual_seed(0)
    checked = checked_of({**SMALL, **SIZED, **RESIDUAL}[name]())
    assert name not in RESIDUAL or len(checked.coupling.blocks) == 2
    captured = checked.coupling.walk.captured
    with enlivened(captured.module):
        prober, graph = graph_of(checked)
        for seed in (0, 1):
            plan = drawn(checked, seed)
            expected = run(cut(checked.coupling, plan, checked.sized), captured.example)
            file = prober.file_of(graph.cut(prober.dense, plan))
            assert relative_difference(answered(file, captured.example[0][0]), expected) < 1e-3


def test_a_filled_graph_keeps_the_attention_of_heads_that_lost_dimensions() -> None:
    """The graph has the whole network's attention scale in it, the cut module that of its own head dimension."""
    torch.manual_seed(0)
    module = TRANSFORMERS["packed"]()
    with torch.no_grad():
        module.get_parameter("scale").fill_(1.0)
        for name, weight in module.named_parameters():
            if name.endswith("qkv.weight"):
                weight.mul_(8.0)  # else attention is nearly uniform, whatever its scale
    checked = checked_of(module)
    captured, (prober, graph) = checked.coupling.walk.captured, graph_of(checked)
    group = next(g for g in checked.coupling.paying_groups() if g.kind == "head_dim")
    plan = {group.name: range(len(group.units) // 4, len(group.units))}
    small = cut(checked.coupling, plan, checked.sized)
    expected = run(small, captured.example)
    file = prober.file_of(graph.filled(prober.network, plan, small))
    assert relative_difference(answered(file, captured.example[0][0]), expected) < 1e-5


def test_an_int8_graph_is_cut_with_its_scales_and_without_its_branches() -> None:
    checked = checked_of(Residual())
    prober, graph = graph_of(checked, Precision.INT8)
    plan = drawn(checked) | {b.name: [0] for b in checked.coupling.blocks}
    whole, small = prober.file_of(graph.cut(prober.dense, {})), graph.cut(prober.dense, plan)
    assert answered(prober.file_of(small), torch.randn(1, 1, 8, 8))[0].shape == (1, 10)
    assert len(prober.file_of(small)) < 0.6 * len(whole)
    assert [n.op_type for n in small.graph.node].count("Conv") == 1
    scales = {i.name: i.dims for i in small.graph.initializer if i.name == "stem.weight_scale"}
    assert scales == {"stem.weight_scale": [8]}


@pytest.mark.parametrize("name", ["batch_norm_as_a_function", "batch_norm_as_a_function_without_bias_before"])
def test_an_int8_graph_with_a_functional_batch_norm_is_cut_and_filled(name: str) -> None:
    checked = checked_of(NETWORKS[name]())
    prober, graph = graph_of(checked, Precision.INT8)
    captured, plan = checked.coupling.walk.captured, drawn(checked)
    small = cut(checked.coupling, plan, checked.sized)
    expected = run(small, captured.example)
    file = prober.file_of(graph.filled(prober.dense, plan, small))
    found = answered(file, captured.example[0][0])
    assert [tuple(x.shape) for x in found] == [tuple(x.shape) for x in expected]
    assert relative_difference(found, expected) < 0.5  # ranges are those of stand-ins: only that the values are its own


def test_a_graph_whose_axes_were_mistaken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(*args: object) -> ties.Ties:
        found = real(*args)
        turned = {k: axes[::-1] for k, axes in found.constants.items()}
        return ties.Ties(found.tensors, turned, found.branches, found.sources)

    real = ties.tie
    monkeypatch.setattr(unit_graph, "tie", swapped)
    with pytest.raises(BuildError, match="cut"):
        graph_of(checked_of(Residual()))


def test_a_graph_that_answers_otherwise_before_anything_is_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an exporter made of the whole network is not taken on trust either."""

    def wrong(self: UnitGraph, dense: Graph, plan: Plan) -> onnx.ModelProto:
        model = real(self, dense, plan)
        if not plan:
            (bias,) = (i for i in model.graph.initializer if i.name == "head.bias")
            bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.1, bias.name))
        return model

    real = UnitGraph.cut
    monkeypatch.setattr(UnitGraph, "cut", wrong)
    with pytest.raises(BuildError, match="does not answer as the cut network does"):
        graph_of(checked_of(Residual()))


def test_a_search_exports_the_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[nn.Module] = []
    real = type(X86).prober
    monkeypatch.setattr(type(X86), "prober", lambda self, module, *rest: (exported.append(module), real(self, module, *rest))[1])
    checked, said = checked_of(Residual()), []
    prober = UnitProber(checked, X86, signature_of(checked), Precision.INT8, said.append)
    sizes = {len(prober.candidate(Structure({"first.0": (left, 24)}))) for left in (24, 16, 8)}
    assert len(sizes) == 3
    assert (len(exported), said) == (1, [])


def test_without_a_graph_to_cut_candidates_are_exported_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise BuildError("operators of one name")

    monkeypatch.setattr(unit_prober, "UnitGraph", refused)
    said: list[str] = []
    checked = checked_of(Residual())
    prober = UnitProber(checked, X86, signature_of(checked), Precision.FP32, said.append)
    one, other = (prober.candidate(Structure({"first.0": (left, 24)})) for left in (16, 8))
    assert len(other) < len(one)
    assert said == ["Every candidate was exported, which takes seconds each: operators of one name"]
