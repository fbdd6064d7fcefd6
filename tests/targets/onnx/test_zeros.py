"""What is left of branches that were left out is taken from the graph, and the graph answers as before."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.run import predictor
from edge_compress.targets.onnx.zeros import drop_zero_additions
from onnx import TensorProto, helper, numpy_helper
from torch import nn


def graph(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    """A model from x (1, 4, 3, 3) to y of the same shape."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 3, 3]) for name in "xy")
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_graph(nodes, "graph", [x], [y], held)
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


X = np.random.default_rng(0).standard_normal((1, 4, 3, 3)).astype(np.float32)


def test_zeros_that_are_permuted_and_scaled_before_they_are_added_go_with_their_operators() -> None:
    model = graph(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["z"]),
            helper.make_node("Transpose", ["z"], ["t"], perm=[0, 3, 1, 2]),
            helper.make_node("Mul", ["t", "scale"], ["s"]),
            helper.make_node("Add", ["s", "x"], ["sum"]),
            helper.make_node("Relu", ["sum"], ["y"]),
        ],
        shape=np.array([1, 3, 3, 4]),
        scale=np.ones((4, 1, 1), np.float32),
    )
    expected = predictor(model.SerializeToString())(X)
    drop_zero_additions(model)
    assert [node.op_type for node in model.graph.node] == ["Relu"]
    assert not model.graph.initializer
    np.testing.assert_array_equal(predictor(model.SerializeToString())(X), expected)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([helper.make_node("Add", ["x", "c"], ["a"]), helper.make_node("Relu", ["a"], ["y"])], {"c": np.float32([0, 0, 1e-9])}),
        (  # the zero has the larger shape
            [
                helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=1),
                helper.make_node("Add", ["m", "c"], ["a"]),
                helper.make_node("Relu", ["a"], ["y"]),
            ],
            {"c": np.zeros((1, 4, 3, 3), np.float32)},
        ),
        ([helper.make_node("Add", ["x", "c"], ["y"])], {"c": np.zeros(3, np.float32)}),  # the graph's output
    ],
    ids=["not zero", "larger", "output"],
)
def test_other_additions_stay(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> None:
    model = graph(nodes, **constants)
    before = model.SerializeToString()
    drop_zero_additions(model)
    assert model.SerializeToString() == before


def test_a_channels_last_block_that_was_left_out_costs_nothing_in_the_file() -> None:
    class Zero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros((x.shape[0], 4, 4, 8))

    class Net(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, 2, 1), block, nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = x + self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 0.5
            return self.head(x).flatten(1)

    model = export_float(Net(Zero()).eval(), image_signature((3, 8, 8), 32))
    assert [node.op_type for node in model.graph.node][:2] == ["Conv", "Conv"]
