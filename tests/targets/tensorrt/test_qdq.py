"""Where the Q/DQ pairs stand, and what is in them: what decides whether TensorRT fuses and runs int8."""

import numpy as np
import onnx
import pytest
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.pipeline.errors import BuildError
from edge_compress.targets.onnx.int8 import Recipe
from edge_compress.targets.tensorrt.qdq import left_in_float, quantize, shortcuts
from onnx import helper, numpy_helper

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

    weight = numpy_helper.from_array(np.zeros((4, 4, 1, 1), np.float32), "w")
    nodes = [
        conv("x", "short"),
        conv("x", "one"),
        helper.make_node("Relu", ["one"], ["two"]),
        conv("two", "long"),
        helper.make_node("Add", ["short", "long"], ["sum"], name="sum"),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [weight])
    assert list(shortcuts(helper.make_model(graph), [])) == ["short"]
    nodes[-1] = helper.make_node("Add", ["long", "short"], ["sum"], name="sum")
    assert list(shortcuts(helper.make_model(helper.make_graph(nodes, "g", [], [], [weight])), [])) == ["short"]
    assert list(shortcuts(helper.make_model(helper.make_graph(nodes, "g", [], [], [weight])), ["short", "one", "long"])) == []


def test_layers_that_a_file_called_int8_leaves_in_float_are_counted(model, tiny_onnx):
    assert left_in_float(model) == ""
    layers = sum(node.op_type in ("Conv", "Gemm") for node in tiny_onnx.graph.node)
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    folded.graph.initializer.append(numpy_helper.from_array(np.zeros((8, 8), np.float32), "val_1"))
    folded.graph.node.append(helper.make_node("MatMul", ["tokens", "val_1"], ["projected"], name="projection"))
    assert left_in_float(folded).startswith(f"1 of {layers + 1} layers with weights stay in float")
