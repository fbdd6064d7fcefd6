"""The linter: nothing on what we build, and each kind of thing TensorRT refuses by its rule and its node."""

import copy

import numpy as np
import onnx
import pytest
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.targets.onnx.int8 import Recipe
from edge_compress.targets.onnx.int8 import quantize as quantize_x86
from edge_compress.targets.tensorrt.lint import RULES, Finding, fours_over_two, lint
from edge_compress.targets.tensorrt.qdq import quantize
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

MINMAX = Recipe("min-max", 8)
STEM, HEAD = "node_Conv_", "node_linear"


@pytest.fixture(scope="module")
def seen(tiny_onnx, images):
    return ranges(collect(tiny_onnx, [images[:4]]), "min-max")


@pytest.fixture(scope="module")
def clean(tiny_onnx, seen):
    return quantize(tiny_onnx, seen, MINMAX)


@pytest.fixture
def graph(clean):
    """A copy to break."""
    return copy.deepcopy(clean)


def node_of(model, kind, of=""):
    return next(n for n in model.graph.node if n.op_type == kind and any(of in name for name in n.input))


def constant(model, name):
    return next(i for i in model.graph.initializer if i.name == name)


def put(model, name, array):
    constant(model, name).CopyFrom(numpy_helper.from_array(array, name))


def found(model, **more):
    return {(f.rule, f.node) for f in lint(model, **more)}


def test_what_the_target_builds_has_nothing_to_find(clean, tiny_onnx):
    assert lint(clean) == ()
    assert lint(tiny_onnx) == ()
    onnx.checker.check_model(clean, full_check=True)


def test_uint8_tensors(graph, clean):
    pair = node_of(graph, "QuantizeLinear", "input")
    zero = pair.input[2]
    fresh = f"{zero}_unsigned"
    graph.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.uint8), fresh))
    back = next(n for n in graph.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == pair.output[0])
    pair.input[2] = back.input[2] = fresh
    assert found(graph) == {("uint8", pair.name), ("uint8", back.name)}
    without = copy.deepcopy(clean)  # no zero point: uint8 by default
    bare = node_of(without, "QuantizeLinear", "input")
    del bare.input[2]
    assert ("uint8", bare.name) in found(without)


def test_a_zero_point_that_is_not_zero(graph):
    pair = node_of(graph, "QuantizeLinear", "input")
    graph.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int8), "three"))
    pair.input[2] = "three"
    assert [(f.rule, f.node, f.found) for f in lint(graph)] == [("zero-point", pair.name, "zero point 3")]


@pytest.mark.parametrize("through", ["DequantizeLinear", "int32"])
def test_a_bias_that_is_not_float(graph, through):
    layer = node_of(graph, "Conv", "stem.weight")
    bias = layer.input[2]
    count = constant(graph, bias).dims[0]
    put(graph, bias, np.zeros(count, np.int32))
    if through == "DequantizeLinear":
        graph.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "bias_scale"))
        at = list(graph.graph.node).index(layer)
        graph.graph.node.insert(at, helper.make_node("DequantizeLinear", [bias, "bias_scale"], ["bias_float"], name="dq_bias"))
        node_of(graph, "Conv", "stem.weight").input[2] = "bias_float"
    assert found(graph) == {("bias", layer.name)}


def test_operators_in_the_quantized_form(graph):
    layer = node_of(graph, "Conv", "stem.weight")
    layer.op_type = "QLinearConv"
    assert found(graph) == {("qoperator", layer.name)}


@pytest.mark.parametrize("opset", [12, 16, 20, 21])
def test_an_opset_outside_what_every_version_takes(graph, opset):
    graph.opset_import[0].version = opset
    assert found(graph) == {("opset", "graph")}


def test_operators_of_another_domain(graph):
    layer = node_of(graph, "Conv", "stem.weight")
    layer.domain = "com.microsoft"
    assert found(graph) == {("opset", layer.name)}


def test_weights_with_one_scale_for_all_channels(graph):
    layer = node_of(graph, "Conv", "stem.weight")
    back = next(n for n in graph.graph.node if n.output[0] == layer.input[1])
    pair = next(n for n in graph.graph.node if n.output[0] == back.input[0])
    for node in (pair, back):
        for name, kind in ((node.input[1], np.float32), (node.input[2], np.int8)):
            put(graph, name, np.full((), 1 if kind is np.float32 else 0, kind))
    assert found(graph) == {("per-channel", layer.name)}


def test_weight_scales_along_the_wrong_axis(graph):
    layer = node_of(graph, "Conv", "a.conv1.weight")  # as many inputs as outputs: only the axis tells
    back = next(n for n in graph.graph.node if n.output[0] == layer.input[1])
    next(a for a in back.attribute if a.name == "axis").i = 1
    assert [(f.rule, f.node) for f in lint(graph)] == [("per-channel", layer.name)]


def test_a_claim_of_2_4_that_the_weights_do_not_keep(tiny_onnx, seen):
    model = copy.deepcopy(tiny_onnx)
    name = "b.conv2.weight"
    weight = numpy_helper.to_array(constant(model, name)).copy()
    weight[:, 2::4] = weight[:, 3::4] = 0
    put(model, name, weight)
    pruned = quantize(model, seen, MINMAX)
    assert lint(pruned, two_four={"b.conv2"}) == ()
    layer = node_of(pruned, "Conv", "b.conv2.weight")
    weight[3, 6, 1, 1] = 0.5
    put(pruned, name, weight)
    (finding,) = lint(pruned, two_four={"b.conv2"})
    assert (finding.rule, finding.node) == ("2:4", layer.name)
    assert finding.found.startswith("1 groups of four inputs")
    assert lint(pruned) == ()  # nobody claims anything
    assert [f.node for f in lint(pruned, two_four={"gone"})] == ["graph"]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_no_steps(graph, scale):
    pair = node_of(graph, "QuantizeLinear", "input")
    put(graph, pair.input[1], np.array(scale, np.float32))
    assert {rule for rule, _ in found(graph)} == {"scale"}


def test_quantizers_that_are_not_in_pairs(graph):
    pair = node_of(graph, "QuantizeLinear", "input")
    back = next(n for n in graph.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == pair.output[0])
    back.input[0] = "elsewhere"
    assert found(graph) == {("pairs", pair.name), ("pairs", back.name)}


def test_what_the_x86_target_builds_is_refused(tiny_onnx, seen):
    rules = {rule for rule, _ in found(quantize_x86(tiny_onnx, seen, MINMAX))}
    assert {"uint8", "bias"} <= rules


def test_a_finding_says_node_what_and_rule():
    assert str(Finding("uint8", "conv1", "x is uint8")) == "conv1: x is uint8 (uint8)"
    assert set(RULES) >= {"opset", "qoperator", "uint8", "zero-point", "bias", "per-channel", "2:4"}


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_groups_of_four_are_counted_along_the_inputs(outputs, groups, nonzero, seed):
    rng = np.random.default_rng(seed)
    weight = np.zeros((outputs, 4 * groups, 3, 1), np.float32)
    for o, g, k in np.ndindex(outputs, groups, 3):
        weight[o, 4 * g + rng.permutation(4)[:nonzero], k, 0] = 1.0
    assert fours_over_two(weight) == (outputs * groups * 3 if nonzero > 2 else 0)


def test_inputs_that_do_not_come_in_fours_cannot_be_2_4():
    assert fours_over_two(np.zeros((8, 3, 3, 3), np.float32)) > 0


def test_a_uint8_input_of_the_graph_is_found(graph):
    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    assert ("uint8", "graph") in found(graph)
