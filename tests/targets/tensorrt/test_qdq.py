"""Where the Q/DQ pairs stand, and what is in them: what decides whether TensorRT fuses and runs int8."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.signature import Signature, TensorSpec
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.graph import Graph
from edge_compress.targets.onnx.int8 import Recipe
from edge_compress.targets.tensorrt.qdq import left_in_float, quantize, shortcuts
from onnx import helper, numpy_helper
from torch import nn

MINMAX = Recipe("min-max", 8)


@pytest.fixture(scope="module")
def seen(tiny_onnx, images):
    return ranges(collect(tiny_onnx, [images[:4]]), "min-max")


@pytest.fixture(scope="module")
def model(tiny_onnx, seen):
    return quantize(tiny_onnx, seen, MINMAX)


def producers(model):
    return {name: node for node in model.graph.node for name in node.output}


def constants(model):
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def test_every_residual_sum_takes_one_operand_from_a_layer_and_one_from_a_pair(model):
    made = producers(model)
    sums = [n for n in model.graph.node if n.op_type == "Add"]
    assert len(sums) == 4  # a, b (its shortcut is a convolution), c, d
    for node in sums:
        assert sorted(made[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"], node.name
    assert any(_from(made, node, "b.conv2.weight") for node in sums)  # of two convolutions the main branch stays one
    assert not any(_from(made, node, "b.shortcut.weight") for node in sums)


def _from(made, node, weight):
    """Whether an operand of a sum is, unquantized, the convolution with this weight."""
    for name in node.input:
        layer = made[name]
        if layer.op_type == "Conv":
            pair = made[made[layer.input[1]].input[0]]
            if pair.input[0] == weight:
                return True
    return False


def test_only_inputs_weights_and_the_one_shortcut_are_quantized(model, tiny_onnx):
    layers = {n.input[0] for n in tiny_onnx.graph.node if n.op_type in ("Conv", "Gemm")}
    weights = {n.input[1] for n in tiny_onnx.graph.node if n.op_type in ("Conv", "Gemm")}
    quantized = {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    (extra,) = quantized - layers - weights
    assert layers | weights <= quantized
    assert producers(tiny_onnx)[extra].input[1] == "b.shortcut.weight"


def test_pairs_are_signed_symmetric_and_weights_have_a_scale_for_each_output(model, seen):
    values, made = constants(model), producers(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = values[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
    image = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "input")
    assert values[image.input[1]] == pytest.approx(max(map(abs, seen["input"])) / 127, rel=1e-5)
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            pair = made[made[node.input[1]].input[0]]
            weight, scale = values[pair.input[0]], values[pair.input[1]]
            largest = np.abs(weight).reshape(len(weight), -1).max(1)
            np.testing.assert_allclose(scale, np.maximum(largest, 1e-12) / 127, rtol=1e-4)
            assert all(values[bias].dtype == np.float32 for bias in node.input[2:])


def test_equal_arguments_give_equal_bytes_and_the_argument_stays_as_it_is(tiny_onnx, seen, model):
    before = tiny_onnx.SerializeToString(deterministic=True)
    again = quantize(tiny_onnx, seen, MINMAX)
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert tiny_onnx.SerializeToString(deterministic=True) == before


def test_layers_that_stay_in_float_have_no_pair_and_an_unknown_one_is_named(tiny_onnx, seen):
    kept = quantize(tiny_onnx, seen, Recipe("min-max", 8, ("stem", "head")))
    quantized = {n.input[0] for n in kept.graph.node if n.op_type == "QuantizeLinear"}
    assert not quantized & {"stem.weight", "head.weight", "input"}
    assert "a.conv1.weight" in quantized
    with pytest.raises(BuildError, match="layer nowhere"):
        quantize(tiny_onnx, seen, Recipe("min-max", 8, ("nowhere",)))


def test_zeros_of_weights_stay_zero(tiny_onnx, seen):
    pruned = onnx.ModelProto()
    pruned.CopyFrom(tiny_onnx)
    slot = next(i for i in pruned.graph.initializer if i.name == "a.conv1.weight")
    weight = numpy_helper.to_array(slot).copy()
    weight[:, ::2] = 0
    slot.CopyFrom(numpy_helper.from_array(weight, slot.name))
    values = constants(quantize(pruned, seen, MINMAX))
    assert not values["a.conv1.weight"][:, ::2].any()


def test_of_two_convolutions_that_are_summed_the_shorter_branch_is_the_shortcut():
    def conv(source, target):
        return helper.make_node("Conv", [source, f"{target}.weight"], [target], name=target)

    weights = [numpy_helper.from_array(np.zeros((4, 4, 1, 1), np.float32), f"{name}.weight") for name in ("short", "one", "long")]
    nodes = [
        conv("x", "short"),
        conv("x", "one"),
        helper.make_node("Relu", ["one"], ["two"]),
        conv("two", "long"),
        helper.make_node("Add", ["short", "long"], ["sum"], name="sum"),
    ]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    assert list(shortcuts(helper.make_model(graph), [])) == ["short"]
    nodes[-1] = helper.make_node("Add", ["long", "short"], ["sum"], name="sum")
    assert list(shortcuts(helper.make_model(helper.make_graph(nodes, "g", [], [], weights)), [])) == ["short"]
    assert list(shortcuts(helper.make_model(helper.make_graph(nodes, "g", [], [], weights)), ["short", "one", "long"])) == []


class Tokens(nn.Module):
    """Attention over four tokens, with a residual stream, and a linear layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.shared = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        x = self.encoder(x)
        return x + self.shared(self.shared(x))


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(0)
    signature = Signature((TensorSpec("x", (4, 8)),), (TensorSpec("y", (4, 8)),))
    return export_float(Tokens().eval(), signature)


def test_every_linear_layer_on_tokens_is_quantized_and_nothing_else_of_a_transformer_is(tokens):
    samples = np.random.default_rng(0).normal(size=(8, 4, 8)).astype(np.float32)
    graph = Graph(quantize(tokens, ranges(collect(tokens, [samples]), "min-max"), MINMAX))
    layers = graph.layers()
    assert Counter(name for name, _ in layers) == {
        "encoder.self_attn.in_proj_weight": 1,
        "encoder.self_attn.out_proj": 1,
        "encoder.linear1": 1,
        "encoder.linear2": 1,
        "shared": 2,
    }
    for name, node in layers:
        assert [graph.producer[tensor].op_type for tensor in node.input[:2]] == ["DequantizeLinear"] * 2, name
    known = {node.name for _, node in layers}
    for node in graph.nodes:
        if node.name not in known and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            made = [graph.producer[tensor].op_type for tensor in node.input if tensor in graph.producer]
            assert "DequantizeLinear" not in made, node
    assert left_in_float(tokens) == ""


def test_a_layer_that_is_called_twice_stays_in_float_at_both_places(tokens):
    samples = np.random.default_rng(0).normal(size=(8, 4, 8)).astype(np.float32)
    found = ranges(collect(tokens, [samples]), "min-max")
    graph = Graph(quantize(tokens, found, Recipe("min-max", 8, ("shared",))))
    at = [node for name, node in graph.layers() if name == "shared"]
    assert len(at) == 2
    assert all(graph.weight(node)[1] == [] for node in at)


def test_layers_that_a_file_called_int8_leaves_in_float_are_counted(model, tiny_onnx):
    assert left_in_float(model) == ""
    layers = sum(node.op_type in ("Conv", "Gemm") for node in tiny_onnx.graph.node)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.initializer.append(numpy_helper.from_array(np.zeros((8, 4, 2, 2), np.float32), "up.weight"))
    other.graph.node.append(helper.make_node("ConvTranspose", ["small", "up.weight"], ["large"], name="up"))
    assert left_in_float(other) == f"1 of {layers + 1} layers with weights stay in float (ConvTranspose)"
