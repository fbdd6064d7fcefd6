from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.signature import Signature, TensorSpec
from edge_compress.targets.onnx.edit import OnnxEditor, pad_stem
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.graph import Graph
from edge_compress.targets.onnx.int8 import Recipe, quantize
from hypothesis import HealthCheck, settings
from onnx import numpy_helper
from torch import nn

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


def without(model, removed):
    """The network without residual branches, each given by the name of its last layer."""
    editor = OnnxEditor(model)
    for name in removed:
        layer = dict(editor.graph.layers())[name]
        derived = set(layer.output)
        for op in editor.ops:
            mine = [tensor for tensor in op.input if tensor in derived]
            if mine and op.op_type == "Add":
                editor.bypass(mine[0], op)
                break
            derived.update(op.output if mine else ())
    editor.drop_dead()
    return editor.build()


@pytest.fixture(scope="module")
def tiny_int8(tiny_onnx, images):
    return int8(tiny_onnx, images)


def test_the_argument_is_left_as_it_was(tiny_int8):
    before = tiny_int8.SerializeToString(deterministic=True)
    without(tiny_int8, ("c.conv2",))
    pad_stem(tiny_int8)
    assert tiny_int8.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "removed", [("a.conv2",), ("d.conv2",), ("c.conv2", "d.conv2"), ("b.conv2",), ("a.conv2", "b.conv2", "d.conv2")]
)
def test_removing_a_branch_is_removing_what_it_adds(tiny_onnx, images, removed):
    silent = with_zeros(tiny_onnx, dict.fromkeys(removed, 0))
    small = without(tiny_onnx, removed)
    assert np.allclose(run(small, images[:3]), run(silent, images[:3]), atol=1e-5)
    assert not np.allclose(run(small, images[:3]), run(tiny_onnx, images[:3]), atol=1e-2)
    gone = {name for last in removed for name in (last, last.replace("conv2", "conv1"))}
    assert dict(Graph(tiny_onnx).layers()).keys() - dict(Graph(small).layers()).keys() == gone
    count = Counter(node.op_type for node in small.graph.node)
    identity = len([name for name in removed if name != "b.conv2"])
    assert count["Add"] == 4 - len(removed)
    assert count["Relu"] == 10 - len(removed) - identity  # relu(relu(x)) is one relu


@pytest.mark.parametrize("removed", [(), ("a.conv2",), ("b.conv2",), ("c.conv2", "d.conv2"), ("a.conv2", "b.conv2", "d.conv2")])
def test_a_cut_int8_network_runs_in_int8_kernels_alone(tiny_onnx, tiny_int8, images, tmp_path, removed):
    small = without(tiny_int8, removed)
    kernels = optimized(small, tmp_path)
    assert kernels["QLinearConv"] == 11 - 2 * len(removed)
    assert kernels["QLinearAdd"] == 4 - len(removed)
    assert kernels["QuantizeLinear"] == 1  # of the image
    assert kernels["DequantizeLinear"] == 0
    whole = run(without(tiny_int8, removed), images)
    exact = run(without(tiny_onnx, removed), images)
    assert np.corrcoef(whole.ravel(), exact.ravel())[0, 1] > 0.98


def test_padding_the_stem_gives_it_channels_in_fours_and_the_same_function(tiny_onnx, images):
    padded = pad_stem(tiny_onnx)
    assert shapes(padded)["stem.weight"] == (8, 4, 3, 3)
    assert np.allclose(run(padded, images[:3]), run(tiny_onnx, images[:3]), atol=1e-6)
    again = pad_stem(padded)
    assert again.SerializeToString() == padded.SerializeToString()


@pytest.mark.parametrize(("convolution", "shape"), [(nn.Conv1d, (1, 16)), (nn.Conv3d, (1, 4, 6, 6))])
def test_a_network_of_signals_or_volumes_is_quantized_without_padding(convolution, shape):
    torch.manual_seed(0)
    net = nn.Sequential(convolution(1, 8, 3, padding=1), nn.ReLU(), convolution(8, 4, 3)).eval()
    inputs = np.random.default_rng(0).standard_normal((4, *shape), dtype=np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(inputs)).numpy()
    model = export_float(net, Signature((TensorSpec("input", shape),), (TensorSpec("y", expected.shape[1:]),)))
    found = quantize(model, ranges(collect(model, [inputs]), "min-max"), Recipe("min-max", 7))
    assert shapes(found)["0.weight_quantized"][1] == 1
    assert np.abs(run(found, inputs) - expected).max() < 0.04 * np.ptp(expected)


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
