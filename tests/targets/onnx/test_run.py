"""Answers of a file do not depend on how many images are given at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import user_net
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.signature import Signature, TensorSpec, image_signature
from edge_compress.targets.onnx import run
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.run import in_blocks, predictor, simulate
from onnx import TensorProto, helper
from torch import nn


def test_a_graph_whose_reshapes_name_one_sample_is_simulated_sample_by_sample() -> None:
    torch.manual_seed(0)
    net = user_net.attending().eval()
    data = export_float(net, image_signature((1, 8, 8))).SerializeToString()
    images = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    for runner in (simulate(data), predictor(data), predictor(data, threads=3)):
        np.testing.assert_allclose(runner(images), expected, rtol=1e-4, atol=1e-5)


def test_samples_computed_side_by_side_come_in_their_order_and_an_error_of_one_is_the_runners() -> None:
    asked = set()

    def answer(given: dict[str, np.ndarray]) -> list[np.ndarray]:
        asked.add(threading.current_thread().name)
        (first, *_) = given["x"].ravel()
        time.sleep(0.02 if int(first) % 2 else 0.0)
        if first == 9:
            raise BuildError("the ninth")
        return [given["x"]]

    runner = in_blocks([("x", "float32")], answer, 1, workers=2)
    some = np.arange(8, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(runner(some), some)
    assert len(asked) == 2
    with pytest.raises(BuildError, match="the ninth"):
        runner(np.float32([[1], [9], [2]]))


def relu(*nodes: onnx.NodeProto) -> bytes:
    """A file from x to y, both (1, 2), by one Relu or by other nodes."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy"]
    graph = helper.make_graph(list(nodes) or [helper.make_node("Relu", ["x"], ["y"])], "graph", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("given", [np.zeros((1, 3), np.float32), (np.zeros((1, 2), np.float32),) * 2], ids=["shape", "count"])
def test_inputs_that_a_file_does_not_take_are_refused_in_one_line(given) -> None:
    with pytest.raises(BuildError) as refused:
        predictor(relu())(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [None, TensorProto.STRING], ids=["none", "strings"])
def test_a_file_whose_inputs_are_no_numbers_is_refused(kind: int | None) -> None:
    inputs = [] if kind is None else [helper.make_tensor_value_info("x", kind, [1])]
    node = (
        helper.make_node("Constant", [], ["y"], value_floats=[1.0])
        if kind is None
        else helper.make_node("Identity", ["x"], ["y"])
    )
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT if kind is None else kind, [1])
    model = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    with pytest.raises(BuildError, match="expected tensors of numbers"):
        predictor(model.SerializeToString())


def test_a_file_whose_name_is_not_utf8_is_loaded(tmp_path: Path) -> None:
    file = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.onnx"))
    file.write_bytes(relu())
    np.testing.assert_array_equal(predictor(str(file))(np.float32([[-1, 2]])), [[0, 2]])


def test_a_file_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_LONGEST_S", 0.5)
    true = helper.make_node("Constant", [], ["true"], value=helper.make_tensor("", TensorProto.BOOL, [], [True]))
    most = helper.make_node("Constant", [], ["most"], value=helper.make_tensor("", TensorProto.INT64, [], [2**62]))
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_in"], ["go"]), helper.make_node("Relu", ["v_in"], ["v"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_in", TensorProto.FLOAT, [1, 2]),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 2]),
        ],
    )
    endless = relu(true, most, helper.make_node("Loop", ["most", "true", "x"], ["y"], body=body))
    with pytest.raises(BuildError, match="no answer after"):
        predictor(endless)(np.zeros((1, 2), np.float32))


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


class ClassToken(nn.Module):
    """Samples that are joined with a constant, which has one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).transpose(1, 2)
        return self.head(torch.cat([h, h.new_ones(h.shape[0], 1, 4)], 1)).mean(1)


def test_a_graph_that_holds_a_constant_of_one_sample_is_simulated_sample_by_sample() -> None:
    torch.manual_seed(0)
    net = ClassToken().eval()
    data = export_float(net, Signature((TensorSpec("x", (2, 8)),), (TensorSpec("y", (3,)),))).SerializeToString()
    inputs = np.random.default_rng(0).standard_normal((5, 2, 8), dtype=np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(simulate(data)(inputs), expected, rtol=1e-4, atol=1e-5)
