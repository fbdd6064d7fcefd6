"""Answers of a file do not depend on how many images are given at once."""

import numpy as np
import torch
import user_net
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.run import predictor, simulate


def test_a_graph_whose_reshapes_name_one_sample_is_simulated_sample_by_sample() -> None:
    torch.manual_seed(0)
    net = user_net.attending().eval()
    data = export_float(net, image_signature((1, 8, 8))).SerializeToString()
    images = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    for runner in (simulate(data), predictor(data)):
        np.testing.assert_allclose(runner(images), expected, rtol=1e-4, atol=1e-5)
