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
