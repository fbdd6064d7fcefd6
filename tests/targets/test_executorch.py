"""ExecuTorch's file: its inputs in order, the ranges its int8 values cover, and what XNNPACK does not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edge_compress import targets
from edge_compress.devices.local import LocalDevice
from edge_compress.pipeline.errors import BuildError, InputError
from edge_compress.pipeline.signature import Signature, TensorSpec, image_signature
from edge_compress.targets.base import FloatArray, Interface
from torch import nn
from torch.nn import functional as F

TARGET = targets.load("executorch")
pytestmark = pytest.mark.skipif(TARGET.missing() is not None, reason=str(TARGET.missing()))
TOKENS = Signature(
    (TensorSpec("ids", (6,), "int64"), TensorSpec("scale", (4,))), (TensorSpec("sum", ()), TensorSpec("mean", (4,))), True
)
IMAGE = image_signature((3, 4, 4))


class Tokens(nn.Module):
    """Two named inputs, one of whole numbers; two outputs, not in the order of their names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, scale: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.layer(self.table(ids)) * scale[:, None]
        return {"sum": states.sum((1, 2)), "mean": states.mean(1)}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.pte"
    path.write_bytes(TARGET.baseline(Tokens().eval(), Interface(TOKENS, ())))
    return path


def test_inputs_go_in_by_the_order_of_the_signature_and_all_outputs_come_back(tokens: Path) -> None:
    draw = np.random.default_rng(0)
    ids, scale = draw.integers(0, 9, (3, 6)), draw.standard_normal((3, 4), dtype=np.float32)
    with torch.no_grad():
        wanted = Tokens().eval()(ids=torch.from_numpy(ids), scale=torch.from_numpy(scale))
    with TARGET.runner(tokens) as run:
        found, nothing = run((ids.astype(np.int32), scale)), run((ids[:0], scale[:0]))
    for array, tensor in zip(found, wanted.values(), strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), atol=1e-5)
    assert [array.shape for array in nothing] == [(0,), (0, 4)]


def test_inputs_of_another_shape_and_files_of_another_kind_are_refused_in_words(
    tokens: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with TARGET.runner(tokens) as run:
        with pytest.raises(BuildError, match="ExecuTorch cannot run"):
            run((np.zeros((1, 7), np.int64), np.zeros((1, 4), np.float32)))
        with pytest.raises(BuildError, match="1 given, expected 2"):
            run(np.zeros((1, 6), np.int64))
    capfd.readouterr()
    (tmp_path / "no.pte").write_bytes(b"no program")
    with pytest.raises(BuildError, match="ExecuTorch cannot load"), TARGET.runner(tmp_path / "no.pte"):
        pass
    assert capfd.readouterr() == ("", "")


def quantized(net: nn.Module, images: FloatArray, most: float | None = None) -> tuple[FloatArray, list[tuple[float, float]]]:
    """Outputs for the images in int8 with ranges of everything seen, or of `most`; and the ranges."""
    from edge_compress.calibration.ranges import ranges
    from edge_compress.targets.pte.int8 import collect, quantize
    from edge_compress.targets.pte.lowering import exported, lowered
    from edge_compress.targets.pte.run import predictor

    program = exported(net.eval(), IMAGE)
    found = ranges(collect(program, [images]), "min-max")
    if most is not None:
        found = dict.fromkeys(found, (-most, most))
    outputs = predictor(lowered(quantize(program, found))[0])(images)
    assert isinstance(outputs, np.ndarray)
    return outputs, sorted(found.values())


def scaled(weight: float) -> nn.Conv2d:
    """A convolution that multiplies by a number."""
    conv = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(weight * torch.eye(3)[:, :, None, None])
    return conv


class Cat(nn.Module):
    """Two branches of different size, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = scaled(0.5), scaled(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.small(x), self.large(x)], 1)


class Late(nn.Module):
    """BatchNorm that nothing folds before the export: torch.fx cannot trace this."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = scaled(1.0), nn.BatchNorm2d(3)
        with torch.no_grad():
            self.bn.weight.fill_(5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) if float(x.shape[0]) == 1.0 else x


class InPlace(nn.Module):
    """An activation that overwrites what the convolution gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = scaled(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.hardswish(self.conv(x), inplace=True)


IMAGES = np.linspace(-4, 4, 48, dtype=np.float32).reshape(1, 3, 4, 4)


def test_activations_are_clipped_at_the_ranges_that_are_given() -> None:
    for most in (4.0, 1.0):
        found, _ = quantized(scaled(1.0), IMAGES, most)
        np.testing.assert_allclose(found, np.clip(IMAGES, -most, most), atol=most / 64)


@pytest.mark.parametrize("make", [Cat, Late, InPlace])
def test_ranges_are_of_the_values_that_are_rounded(make: Callable[[], nn.Module]) -> None:
    """Of all tensors that share a scale; behind a folded BatchNorm; before what overwrites them."""
    net = make().eval()
    with torch.no_grad():
        wanted = net(torch.from_numpy(IMAGES)).numpy()
    found, _ = quantized(net, IMAGES)
    np.testing.assert_allclose(found, wanted, atol=2 * np.ptp(wanted) / 255)


def test_what_a_clamp_cuts_off_gets_no_steps() -> None:
    found, ranges = quantized(nn.Sequential(scaled(30.0), nn.ReLU6()), IMAGES)
    np.testing.assert_allclose(found, np.clip(30 * IMAGES, 0, 6), atol=30 * 8 / 255)  # of the input's steps
    assert max(high for _, high in ranges) == 6.0


def linear(weight: float, bias: float) -> nn.Module:
    """A linear layer of small random weights, whose first row is zero but for its bias."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 5)
    with torch.no_grad():
        layer.weight.uniform_(-weight, weight)
        layer.weight[0], layer.bias[:] = 0.0, torch.tensor([bias, 0.0, 0.0, 0.0, 0.0])
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize(("weight", "bias", "size"), [(1e-3, 0.0, 1.0), (1e-3, 5.0, 1e-3)], ids=["steps", "bias"])
def test_small_weights_get_all_steps_and_bias_its_value(weight: float, bias: float, size: float) -> None:
    net, images = linear(weight, bias), size * np.random.default_rng(0).uniform(-4, 4, (8, 3, 4, 4)).astype(np.float32)
    with torch.no_grad():
        wanted = net(torch.from_numpy(images)).numpy()
    found, _ = quantized(net, images)
    assert np.square(found - wanted).mean() < 1e-3 * np.square(wanted).mean()


def test_what_stays_in_float_or_with_the_portable_kernels_is_named() -> None:
    from edge_compress.targets.pte.int8 import collect, float_layers, quantize
    from edge_compress.targets.pte.lowering import exported, lowered

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deep = scaled(1.0), nn.Conv3d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deep(self.conv(x)[:, :, None]).cumsum(1)

    program = exported(Sums().eval(), IMAGE)
    network = quantize(program, dict.fromkeys(collect(program, [IMAGES]), (-1.0, 1.0)))
    assert float_layers(network) == {"conv3d": 1}
    assert {"cumsum", "convolution"} <= lowered(network)[1].keys()


def test_the_agent_says_the_files_inputs_takes_them_and_answers_as_here(tokens: Path) -> None:
    ids, scale = np.arange(6)[None], np.ones((1, 4), np.float32)
    with LocalDevice().connect() as agent:
        model = agent.load(tokens, "executorch", 1)
        with TARGET.runner_through(tokens, model.run) as run:
            there = run((ids, scale))
        with pytest.raises(InputError, match="input_0"):
            model.run({"input_0": np.zeros((1, 5), np.int64), "input_1": scale})
    with TARGET.runner(tokens) as run:
        here = run((ids, scale))
    for one, other in zip(there, here, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_printed_code_answers_as_the_file_does(tmp_path: Path) -> None:
    from edge_compress.pipeline.report.format import render
    from edge_compress.targets.pte.run import sides_of

    net, path = nn.Sequential(scaled(2.0), nn.Flatten(), nn.Linear(48, 5)).eval(), tmp_path / "model.pte"
    path.write_bytes(TARGET.baseline(net, Interface(IMAGE, tuple("abcde"))))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    inputs, outputs = sides_of(IMAGE, mean, std)
    given = {"file": str(path), "inputs": inputs, "outputs": outputs, "image": "NCHW", "channels": 3, "size": (4, 4)}
    code = render("use_executorch.py.jinja", **given, mean=list(mean), std=list(std))
    names: dict[str, Callable[..., FloatArray]] = {}
    exec(compile(code, "use.py", "exec"), names)
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    pixels = ((image / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
    with TARGET.runner(path) as run:
        np.testing.assert_allclose(names["predict"](image), np.asarray(run(pixels))[0], atol=1e-5)
