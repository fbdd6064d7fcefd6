from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.pipeline.errors import BuildError
from edge_compress.targets.base import Structure
from edge_compress.targets.onnx.edit import cut, pad_stem
from edge_compress.targets.onnx.graph import Graph
from edge_compress.targets.onnx.int8 import Recipe, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

FEW = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(model, images):
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])


def optimized(model, folder):
    """Operator counts of the graph that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def with_zeros(model, starts):
    """The network whose layers give zero from a channel on."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for initializer in changed.graph.initializer:
        layer, _, kind = initializer.name.rpartition(".")
        if layer in starts and kind in ("weight", "bias"):
            value = numpy_helper.to_array(initializer).copy()
            value[starts[layer] :] = 0
            initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
    return changed


def int8(model, images):
    return quantize(model, ranges(collect(model, [images]), "min-max"), Recipe("min-max", 8))


def shapes(model):
    return {i.name: tuple(i.dims) for i in model.graph.initializer}


def narrowed(inner_a, inner_b, stream):
    """Widths with the inner channels of blocks a and b and the second stream cut."""
    return {
        "a.conv1": (8, inner_a),
        "a.conv2": (inner_a, 8),
        "b.conv1": (8, inner_b),
        "b.conv2": (inner_b, stream),
        "b.shortcut": (8, stream),
        "dw": (stream, stream),
        "c.conv1": (stream, 16),
        "c.conv2": (16, stream),
        "d.conv1": (stream, 16),
        "d.conv2": (16, stream),
        "head": (stream, 5),
    }


@pytest.fixture(scope="module")
def tiny_int8(tiny_onnx, images):
    return int8(tiny_onnx, images)


@given(inner_a=st.integers(1, 8), inner_b=st.integers(1, 16), stream=st.integers(1, 16))
@FEW
def test_cutting_channels_that_are_zero_changes_nothing(tiny_onnx, images, inner_a, inner_b, stream):
    widths = narrowed(inner_a, inner_b, stream)
    dense = with_zeros(tiny_onnx, {name: outputs for name, (_, outputs) in widths.items() if name != "head"})
    small = cut(dense, Structure(widths))
    assert np.allclose(run(small, images[:2]), run(dense, images[:2]), atol=1e-5)
    found = shapes(small)
    assert found["b.conv1.weight"] == (inner_b, 8, 3, 3)
    assert found["b.conv2.weight"] == (stream, inner_b, 3, 3)
    assert found["dw.weight"] == (stream, 1, 3, 3)
    assert found["dw.bias"] == (stream,)
    assert found["head.weight"] == (5, stream)


def test_cutting_a_quantized_network_cuts_scales_and_biases_too(tiny_onnx, images):
    widths = narrowed(4, 8, 12)
    dense = int8(with_zeros(tiny_onnx, {name: outputs for name, (_, outputs) in widths.items() if name != "head"}), images)
    small = cut(dense, Structure(widths))
    assert np.allclose(run(small, images[:4]), run(dense, images[:4]), atol=1e-4)
    found = shapes(small)
    assert found["b.conv2.weight_quantized"] == (12, 8, 3, 3)
    assert found["b.conv2.weight_scale"] == found["b.conv2.weight_zero_point"] == (12,)
    assert found["b.conv2.bias_quantized"] == found["b.conv2.bias_quantized_scale"] == (12,)
    assert found["stem.weight_quantized"][1] == 4  # three colours and one channel of zeros


def test_the_argument_is_left_as_it_was(tiny_int8):
    before = tiny_int8.SerializeToString(deterministic=True)
    cut(tiny_int8, Structure(narrowed(4, 8, 8), ("c.conv2",)))
    pad_stem(tiny_int8)
    assert tiny_int8.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "removed", [("a.conv2",), ("d.conv2",), ("c.conv2", "d.conv2"), ("b.conv2",), ("a.conv2", "b.conv2", "d.conv2")]
)
def test_removing_a_branch_is_removing_what_it_adds(tiny_onnx, images, removed):
    silent = with_zeros(tiny_onnx, dict.fromkeys(removed, 0))
    small = cut(tiny_onnx, Structure({}, removed))
    assert np.allclose(run(small, images[:3]), run(silent, images[:3]), atol=1e-5)
    assert not np.allclose(run(small, images[:3]), run(tiny_onnx, images[:3]), atol=1e-2)
    gone = {name for last in removed for name in (last, last.replace("conv2", "conv1"))}
    assert set(Graph(tiny_onnx).layers()) - set(Graph(small).layers()) == gone
    count = Counter(node.op_type for node in small.graph.node)
    identity = len([name for name in removed if name != "b.conv2"])
    assert count["Add"] == 4 - len(removed)
    assert count["Relu"] == 10 - len(removed) - identity  # relu(relu(x)) is one relu


@pytest.mark.parametrize("removed", [(), ("a.conv2",), ("b.conv2",), ("c.conv2", "d.conv2"), ("a.conv2", "b.conv2", "d.conv2")])
def test_a_cut_int8_network_runs_in_int8_kernels_alone(tiny_onnx, tiny_int8, images, tmp_path, removed):
    small = cut(tiny_int8, Structure(narrowed(8, 8, 8), removed))
    kernels = optimized(small, tmp_path)
    assert kernels["QLinearConv"] == 11 - 2 * len(removed)
    assert kernels["QLinearAdd"] == 4 - len(removed)
    assert kernels["QuantizeLinear"] == 1  # of the image
    assert kernels["DequantizeLinear"] == 0
    whole = run(cut(tiny_int8, Structure({}, removed)), images)
    exact = run(cut(tiny_onnx, Structure({}, removed)), images)
    assert np.corrcoef(whole.ravel(), exact.ravel())[0, 1] > 0.98


def test_an_unknown_layer_and_a_branch_without_a_sum_are_named(tiny_onnx):
    with pytest.raises(BuildError, match=r"layer e\.conv1 is not in the exported graph"):
        cut(tiny_onnx, Structure({"e.conv1": (8, 8)}))
    with pytest.raises(BuildError, match="the branch that ends in stem"):
        cut(tiny_onnx, Structure({}, ("stem",)))


def test_batchnorm_that_stands_alone_is_cut_with_its_channels():
    def constant(name, *shape):
        return numpy_helper.from_array(np.full(shape, 0.5, np.float32), name)

    weights = [
        constant("one.weight", 8, 3, 1, 1),
        *(constant(f"norm_{n}", 8) for n in "sbmv"),
        constant("two.weight", 2, 8, 1, 1),
    ]
    nodes = [
        onnx.helper.make_node("Conv", ["input", "one.weight"], ["x"], name="n1"),
        onnx.helper.make_node("BatchNormalization", ["x", "norm_s", "norm_b", "norm_m", "norm_v"], ["y"], name="n2"),
        onnx.helper.make_node("Conv", ["y", "two.weight"], ["logits"], name="n3"),
    ]
    image = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, 4, 4])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 2, 4, 4])
    graph = onnx.helper.make_graph(nodes, "g", [image], [logits], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    small = cut(model, Structure({"one": (3, 5), "two": (5, 2)}))
    assert shapes(small)["norm_v"] == (5,)
    assert run(small, np.ones((1, 3, 4, 4), np.float32)).shape == (1, 2, 4, 4)


def test_padding_the_stem_gives_it_channels_in_fours_and_the_same_function(tiny_onnx, images):
    padded = pad_stem(tiny_onnx)
    assert shapes(padded)["stem.weight"] == (8, 4, 3, 3)
    assert np.allclose(run(padded, images[:3]), run(tiny_onnx, images[:3]), atol=1e-6)
    again = pad_stem(padded)
    assert again.SerializeToString() == padded.SerializeToString()


def test_quantizing_twice_gives_the_same_bytes_and_seven_bits_stay_seven(tiny_onnx, images, tiny_int8):
    assert int8(tiny_onnx, images).SerializeToString(deterministic=True) == tiny_int8.SerializeToString(deterministic=True)
    known = ranges(collect(tiny_onnx, [images[:2]]), "min-max")
    largest = {}
    for bits in (7, 8):
        model = quantize(tiny_onnx, known, Recipe("min-max", bits))
        values = [numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith("weight_quantized")]
        largest[bits] = max(int(np.abs(value.astype(int)).max()) for value in values)
    assert largest == {7: 64, 8: 127}


def test_layers_left_in_float_are_float_and_the_logits_are_never_rounded(tiny_onnx, tiny_int8, images):
    model = quantize(tiny_onnx, ranges(collect(tiny_onnx, [images[:2]]), "min-max"), Recipe("min-max", 8, ("stem", "head")))
    assert {"stem.weight", "head.weight"} <= set(shapes(model))
    assert "a.conv1.weight_quantized" in shapes(model)
    assert next(node.op_type for node in tiny_int8.graph.node if "logits" in node.output) == "Gemm"
    with pytest.raises(BuildError, match="layer nowhere"):
        quantize(tiny_onnx, {}, Recipe("min-max", 8, ("nowhere",)))
