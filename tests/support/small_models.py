"""Models that are made in a moment."""

from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper


def _saved(path: Path, nodes: list[NodeProto], *weights: tuple[str, np.ndarray]) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 24, 24])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(w, name) for name, w in weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def convolution(path: Path, channels: int) -> Path:
    """One 3x3 convolution of 16 channels to some, on 24x24."""
    weight = np.random.default_rng(0).standard_normal((channels, 16, 3, 3)).astype(np.float32)
    return _saved(path, [helper.make_node("Conv", ["x", "conv.weight"], ["y"], pads=[1, 1, 1, 1])], ("conv.weight", weight))


def two_layers(path: Path, channels: int) -> Path:
    """Two convolutions with a ReLU after each."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((channels, 16, 3, 3)).astype(np.float32)
    second = rng.standard_normal((8, channels, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "layer1.weight"], ["a"], pads=[1, 1, 1, 1], name="node_1"),
        helper.make_node("Relu", ["a"], ["b"], name="node_2"),
        helper.make_node("Conv", ["b", "layer2.weight"], ["c"], pads=[1, 1, 1, 1], name="node_3"),
        helper.make_node("Relu", ["c"], ["y"], name="node_4"),
    ]
    return _saved(path, nodes, ("layer1.weight", first), ("layer2.weight", second))


def hungry(path: Path, megabytes: int) -> Path:
    """A small file that needs so much memory for its single inference."""
    side = int((megabytes * 1e6 / (16 * 24 * 24 * 4)) ** 0.5)
    nodes = [
        helper.make_node("Tile", ["x", "times"], ["t"]),
        helper.make_node("ReduceMax", ["t"], ["y"], keepdims=1),
    ]
    return _saved(path, nodes, ("times", np.array([1, 1, side, side], np.int64)))
