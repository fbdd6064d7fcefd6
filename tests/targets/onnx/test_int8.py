"""Transformers in int8: padding masks and the residual stream leave their layers' inputs their steps, and layers run in int8."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.pipeline.signature import Signature, TensorSpec
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.graph import Graph
from edge_compress.targets.onnx.int8 import Recipe, between_token_layers, quantize
from edge_compress.targets.onnx.run import predictor
from torch import nn
from torch.nn import functional as F

TOKENS, WIDTH = 12, 32
LARGE = 60.0  # one value of the residual stream, as trained encoders have


class Encoder(nn.Module):
    """Two layers of post-norm attention and MLP under an additive padding mask."""

    def __init__(self, hidden_by: float) -> None:
        super().__init__()
        self.hidden_by = hidden_by
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.rise = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(2))
        self.fall = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        with torch.no_grad():
            for layer in self.fall:
                layer.bias[3] = LARGE

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = (1 - mask[:, None].to(x)) * self.hidden_by
        for at in range(2):
            q, k, v = self.qkv[at](x).chunk(3, -1)
            scores = q @ k.transpose(1, 2) / WIDTH**0.5 + hidden
            x = self.norms[2 * at](x + scores.softmax(-1) @ v)
            x = self.norms[2 * at + 1](x + self.fall[at](F.gelu(self.rise[at](x))))
        return x[:, 0]


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, TOKENS + 1, 24)
    return rng.standard_normal((24, TOKENS, WIDTH), np.float32), (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)


def exported(net: nn.Module) -> onnx.ModelProto:
    inputs = (TensorSpec("x", (TOKENS, WIDTH)), TensorSpec("mask", (TOKENS,), "int64"))
    return export_float(net, Signature(inputs, (TensorSpec("y", (WIDTH,)),)))


def encoder(hidden_by: float) -> Encoder:
    torch.manual_seed(0)
    return Encoder(hidden_by).eval()


@pytest.mark.parametrize("hidden_by", [torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("method", ["min-max", "percentile-99.99", "entropy"])
def test_an_encoder_with_padding_answers_in_int8_nearly_as_in_float(samples, hidden_by: float, method: str) -> None:
    net = encoder(hidden_by)
    network = exported(net)
    quantized = quantize(network, ranges(collect(network, [samples]), method), Recipe(method, 7))
    with torch.no_grad():
        expected = net(*map(torch.from_numpy, samples)).numpy()
    found = np.asarray(predictor(quantized.SerializeToString())(samples)).reshape(expected.shape)
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()


def test_padding_does_not_leak_into_an_int8_encoder_whose_scores_are_quantized(samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_compress.targets.onnx.int8.between_token_layers", lambda _: [])
    network = exported(encoder(-1e9))
    quantized = quantize(network, ranges(collect(network, [samples]), "min-max"), Recipe("min-max", 7)).SerializeToString()
    x, mask = samples
    other = np.where(mask[..., None] > 0, x, x[::-1]).astype(np.float32)  # another padding
    one, two = (np.asarray(predictor(quantized)((values, mask))) for values in (x, other))
    assert np.abs(one - two).mean() < 0.02 * np.abs(one).mean()


def test_every_linear_layer_on_tokens_is_an_int8_operator_of_the_runtime(samples, tmp_path: Path) -> None:
    network = exported(encoder(-1e9))
    quantized = quantize(network, ranges(collect(network, [samples]), "min-max"), Recipe("min-max", 7))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "loaded.onnx"), 4
    onnxruntime.InferenceSession(quantized.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 6
    assert "Gemm" not in kinds  # of dequantized weights
    assert kinds["DequantizeLinear"] <= 1


def test_operators_of_a_convolutional_network_are_all_quantized() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)),
        nn.Softmax(1),
    )
    network = export_float(net.eval(), Signature((TensorSpec("x", (3, 8, 8)),), (TensorSpec("y", (5,)),)))
    assert between_token_layers(Graph(network)) == []
