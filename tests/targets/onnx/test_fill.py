"""A quantized graph that is filled with the values it was made from is the graph the quantizer makes."""

import numpy as np
import pytest
import torch
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.onnx.edit import OnnxEditor
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.fill import fill
from edge_compress.targets.onnx.int8 import STEPS, Recipe, quantize
from onnx import numpy_helper
from torch import nn


@pytest.mark.parametrize("bits", [7, 8])
def test_filling_rounds_weights_as_the_quantizer_does(bits: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)).eval()
    with torch.no_grad():  # channels that only their bias makes
        net[2].weight[:2] *= torch.tensor([0.0, 1e-12])[:, None, None, None]
        net[2].bias[:2] = torch.tensor([0.7, -0.7])
    model = export_float(net, image_signature((4, 8, 8)))
    images = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)
    quantized = quantize(model, ranges(collect(model, [images]), "min-max"), Recipe("min-max", bits))
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith(("weight", "bias"))}
    editor = OnnxEditor(quantized)
    fill(editor, values, STEPS[bits])
    expected, found = ({i.name: numpy_helper.to_array(i) for i in m.graph.initializer} for m in (quantized, editor.build()))
    weights = [name for name in expected if name.endswith("weight_quantized")]
    assert len(weights) == 3
    for name in weights:
        np.testing.assert_array_equal(found[name], expected[name])
        assert np.abs(found[name].astype(int)).max() == STEPS[bits]
        bias = name.replace("weight", "bias")
        exact = values[bias.removesuffix("_quantized")]
        np.testing.assert_allclose(
            found[bias] * found[bias.replace("_quantized", "_quantized_scale")], exact, rtol=1e-3, atol=1e-3
        )
