"""Operators that the converter would refuse or change."""

import numpy as np
import pytest
import torch
from edge_compress.pipeline.signature import Signature, TensorSpec
from edge_compress.targets.phone import TARGET
from edge_compress.targets.tflite.convert import _unfold, convert
from edge_compress.targets.tflite.run import predictor
from torch import Tensor, nn


@pytest.mark.parametrize(("dimension", "size", "step"), [(2, 5, 5), (2, 3, 2), (-1, 3, 3), (3, 4, 1), (2, 4, 4)])
def test_windows_are_those_of_torch(dimension: int, size: int, step: int) -> None:
    x = torch.randn(2, 3, 10, 9)
    assert torch.equal(_unfold(x, dimension, size, step), x.unfold(dimension, size, step))


class Windows(nn.Module):
    """Puts windows of places into channels, as XFeat does before its keypoint head."""

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(x.shape[0], 2, 2, 3, 16)
        return windows.permute(0, 1, 4, 2, 3).reshape(x.shape[0], -1, 2, 3)


@pytest.mark.skipif(TARGET.missing() is not None, reason=f"phone: {TARGET.missing()}")
def test_windows_of_windows_convert_and_answer_as_the_module_does() -> None:
    signature = Signature((TensorSpec("x", (2, 8, 12), "float32"),), (TensorSpec("y", (32, 2, 3), "float32"),))
    x = torch.randn(1, 2, 8, 12)
    data, _ = convert(Windows().eval(), signature)
    np.testing.assert_allclose(predictor(data)(x.numpy()), Windows()(x), atol=1e-6)


class Features(nn.Module):
    """Gives features and their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, y.mean((2, 3))


@pytest.mark.skipif(TARGET.missing() is not None, reason=f"phone: {TARGET.missing()}")
def test_features_whose_mean_is_taken_may_be_an_output_too() -> None:
    outputs = (TensorSpec("y", (4, 6, 6)), TensorSpec("mean", (4,)))
    net, x = Features().eval(), torch.randn(1, 3, 8, 8)
    data, _ = convert(net, Signature((TensorSpec("x", (3, 8, 8)),), outputs))
    for found, wanted in zip(predictor(data)(x.numpy()), net(x), strict=True):
        np.testing.assert_allclose(found, wanted.detach(), atol=1e-5)
