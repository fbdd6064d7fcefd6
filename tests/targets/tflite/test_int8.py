"""The int8 network gives what the float one gives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.calibration.ranges import ranges
from edge_compress.pipeline.signature import Signature, TensorSpec, image_signature
from edge_compress.targets.phone import TARGET
from torch import nn

pytestmark = pytest.mark.skipif(TARGET.missing() is not None, reason=f"phone: {TARGET.missing()}")
SHAPE = (4, 8, 8)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(4, 4, 3),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, 2),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_bias_of_a_channel_without_weights_is_kept(kind: str) -> None:
    from edge_compress.targets.tflite.convert import convert
    from edge_compress.targets.tflite.int8 import collect, quantize
    from edge_compress.targets.tflite.run import predictor

    torch.manual_seed(0)
    layer = LAYERS[kind]()
    last: Any = layer[-1] if isinstance(layer, nn.Sequential) else layer
    with torch.no_grad():
        for channel, size in enumerate((0.0, 1e-12)):
            (last.weight[:, channel] if isinstance(last, nn.ConvTranspose2d) else last.weight[channel]).mul_(size)
        last.bias[:2] = torch.tensor([0.7, -0.7])
    inputs = np.random.default_rng(0).standard_normal((4, *SHAPE), dtype=np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(inputs)).numpy()
    signature = Signature(image_signature(SHAPE).inputs, (TensorSpec("y", expected.shape[1:]),))
    data, _ = convert(layer.eval(), signature)
    found = predictor(quantize(data, ranges(collect(data, [inputs]), "min-max"), float_io=True))(inputs)
    np.testing.assert_allclose(found, expected, atol=2 * np.ptp(expected) / 255)


class MaskedMean(nn.Module):
    """The mean of the tokens that a mask leaves, as sentence encoders pool."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = mask.to(tokens.dtype)[..., None]
        return (self.layer(tokens) * kept).sum(1) / kept.sum(1).clamp(min=1e-9)


def test_a_division_by_a_number_that_may_be_zero_runs_and_is_not_rounded() -> None:
    from edge_compress.targets.tflite.convert import convert
    from edge_compress.targets.tflite.int8 import collect, quantize
    from edge_compress.targets.tflite.run import predictor

    torch.manual_seed(0)
    network, rng = MaskedMean().eval(), np.random.default_rng(0)
    tokens, mask = rng.standard_normal((6, 5, 8), dtype=np.float32), np.arange(5)[None] < np.array([1, 2, 3, 4, 5, 5])[:, None]
    inputs = (tokens, mask.astype(np.int64))
    with torch.no_grad():
        expected = network(*map(torch.from_numpy, inputs)).numpy()
    entries = (TensorSpec("tokens", (5, 8)), TensorSpec("mask", (5,), "int64"))
    data, _ = convert(network, Signature(entries, (TensorSpec("y", (8,)),)))
    run = predictor(quantize(data, ranges(collect(data, [inputs]), "min-max"), float_io=True))
    np.testing.assert_allclose(run(inputs), expected, atol=0.05 * np.ptp(expected))
    nothing = (tokens, np.zeros_like(inputs[1]))  # no token is left: timing feeds such inputs
    assert np.asarray(run(nothing)).shape == expected.shape  # it does not fail
