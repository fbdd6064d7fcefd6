"""Answers of a file do not depend on how many images are given at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


TELLING = """
import sys
import numpy as np
from onnx import TensorProto, helper
import edge_compress
from edge_compress.targets.onnx.run import predictor
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
predictor(model.SerializeToString(), 1)(np.zeros((1, 2), np.float32))
"""


def test_the_runtime_sends_no_usage_data_and_keeps_no_device_id(tmp_path: Path) -> None:
    places = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TMPDIR")}
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | places
    subprocess.run([sys.executable, "-B", "-c", TELLING], check=True, env=environment)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_user_who_wants_usage_data_sent_is_left_alone() -> None:
    code = "import os, edge_compress; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "0"}
    ended = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert ended.stdout == "0\n"
