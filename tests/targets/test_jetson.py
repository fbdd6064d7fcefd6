"""The Jetson target without a Jetson: what is built, what is refused, what is estimated."""

import json
from dataclasses import replace

import nets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.evaluate.unit_prober import UnitProber
from edge_compress.pipeline.options import SPARSITY_KEY, Pattern, Precision
from edge_compress.pipeline.reconstruct.gptq import round_weights
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import Kind
from edge_compress.targets import jetson
from edge_compress.targets.base import BuildRequest, Estimator, Interface, Structure
from edge_compress.targets.tensorrt import parser_check as tensorrt_check
from edge_compress.targets.tensorrt.lint import lint
from edge_compress.targets.tensorrt.prober import FLOOR_S, OPERATIONS_PER_S, Work, seconds
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

SHAPE = (3, 12, 12)


@pytest.fixture(autouse=True)
def _without_the_parser(monkeypatch):
    """What NVIDIA's parser says has its own tests; here it would only take time."""
    monkeypatch.setattr(tensorrt_check, "MODULE", "no_such_module")


def request(tiny, images, folder, precision=Precision.INT8, score=None, **more):
    def agreement(predict):
        with torch.no_grad():
            expected = tiny(torch.from_numpy(images)).numpy().argmax(1)
        return 100.0 * float((predict(images).argmax(1) == expected).mean())

    return BuildRequest(
        module=tiny,
        baseline=jetson.TARGET.baseline(tiny, Interface(image_signature(SHAPE), tuple("abcde"))),
        signature=image_signature(SHAPE),
        classes=tuple("abcde"),
        precision=precision,
        calibration=[images[:5], images[5:8]],
        score=score or agreement,
        folder=folder,
        **more,
    )


def scripted(figures):
    asked = []

    def score(predict):
        asked.append(predict)
        return figures[len(asked) - 1]

    return score, asked


def test_int8_is_a_file_that_the_linter_has_nothing_on_and_answers_like_the_network(tiny, images, tmp_path):
    artifact = jetson.TARGET.build(request(tiny, images, tmp_path))
    model = onnx.load(tmp_path / artifact.file.path)
    assert lint(model) == ()
    assert {n.op_type for n in model.graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    notes = {p.key: p.value for p in model.metadata_props}
    assert json.loads(notes["classes"]) == list("abcde")
    assert notes[SPARSITY_KEY] == "disable"
    assert artifact.options["activation_type"] == "int8"
    assert artifact.options["linter"] == "nothing found"
    assert any("not seen by NVIDIA's parser" in note for note in artifact.notes)
    again = jetson.TARGET.build(request(tiny, images, tmp_path))
    assert (again.file, again.baseline) == (artifact.file, artifact.baseline)


def test_the_simulation_rounds_at_every_pair_and_nowhere_else(tiny, images, tmp_path):
    """Against the unoptimised graph, operator by operator; ONNX Runtime's own int8 kernels would not pass."""
    artifact = jetson.TARGET.build(request(tiny, images, tmp_path))
    path = tmp_path / artifact.file.path
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    expected = np.concatenate([plain.run(None, {"input": image[None]})[0] for image in images])
    with jetson.TARGET.runner(path) as run, jetson.TARGET.runner(tmp_path / artifact.baseline.path) as dense:
        found, exact = run(images), dense(images)
    spread = np.ptp(expected)
    assert np.abs(found - expected).max() < 0.02 * spread  # a value on the edge of a step may fall to either side
    assert np.median(np.abs(found - expected)) < 1e-3 * spread
    assert np.abs(found - exact).max() > 1e-3 * spread  # it does round
    with torch.no_grad():
        assert np.abs(exact - tiny(torch.from_numpy(images)).numpy()).max() < 1e-4


def test_half_precision_has_float_ends_and_float_is_left_alone(tiny, images, tmp_path):
    half = jetson.TARGET.build(request(tiny, images, tmp_path, Precision.FP16))
    model = onnx.load(tmp_path / half.file.path)
    kinds = {i.data_type for i in model.graph.initializer if len(i.dims) > 1}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert lint(model) == ()
    with jetson.TARGET.runner(tmp_path / half.file.path) as run, jetson.TARGET.runner(tmp_path / half.baseline.path) as dense:
        assert np.abs(run(images) - dense(images)).max() < 0.05
    whole = jetson.TARGET.build(request(tiny, images, tmp_path, Precision.FP32))
    assert whole.file.sha256 == whole.baseline.sha256


def test_the_ranges_that_cost_least_on_the_search_split_win_and_layers_go_to_float_only_when_they_must(tiny, images, tmp_path):
    score, asked = scripted([90.0, 89.8, 89.8, 89.9, 89.85])
    artifact = jetson.TARGET.build(request(tiny, images, tmp_path, score=score))
    assert (artifact.options["ranges"], artifact.options["excluded"], len(asked)) == ("percentile-99.99", "", 5)
    score, asked = scripted([90.0, 88.0, 88.0, 88.0, 88.0, 88.5, 89.9])
    artifact = jetson.TARGET.build(request(tiny, images, tmp_path, score=score))
    assert (artifact.options["excluded"], len(asked)) == ("stem", 7)
    score, _ = scripted([90.0, 88.0, 88.0, 88.0, 88.0, 88.5, 88.6, 88.7])
    artifact = jetson.TARGET.build(request(tiny, images, tmp_path, score=score))
    assert any("costs 1.30 points" in note for note in artifact.notes)


def test_weights_rounded_together_are_tried_before_a_layer_goes_to_float(tiny, images, tmp_path):
    score, asked = scripted([90.0, 88.0, 88.0, 88.0, 88.0, 89.9])
    rounded = round_weights(tiny, [images[:8]])
    made = jetson.TARGET.build(request(tiny, images, tmp_path, score=score, rounded=lambda steps: rounded))
    assert (made.options["rounding"], made.options["excluded"], len(asked)) == ("compensated", "", 6)
    with jetson.TARGET.runner(tmp_path / made.file.path) as run:
        own, others = (float(np.abs(run(images) - _logits(net, images)).mean()) for net in (rounded, tiny))
    assert own < others


def _logits(net, images):
    with torch.no_grad():
        return net(torch.from_numpy(images)).numpy()


class Rotated(nn.Module):
    """A network with an operator of which TensorRT gets a uint8 tensor."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = F.relu(self.conv(x)).mean((2, 3))
        return self.head(y.to(torch.uint8).to(torch.float32))


def test_what_tensorrt_would_refuse_is_refused_with_the_node(images, tmp_path):
    with pytest.raises(BuildError, match=r"TensorRT would refuse the network: found \S+: casts to uint8 \(uint8\)"):
        jetson.TARGET.build(request(Rotated().eval(), images, tmp_path, Precision.FP32))


def test_a_refusal_of_nvidias_parser_ends_the_build_and_a_check_that_does_not_run_is_a_note(tiny, images, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_check, "missing", lambda: None)
    no = tensorrt_check.ParserVerdict("1.7", False, False, 0, 0, ("Plugin not found",))
    monkeypatch.setattr(tensorrt_check, "check", lambda data, two_four: no)
    with pytest.raises(BuildError, match="Plugin not found"):
        jetson.TARGET.build(request(tiny, images, tmp_path, Precision.FP32))

    def absent(data, two_four):
        raise tensorrt_check.UnavailableError("the parser check", found="signal 11")

    monkeypatch.setattr(tensorrt_check, "check", absent)
    assert any("signal 11" in note for note in jetson.TARGET.build(request(tiny, images, tmp_path, Precision.FP32)).notes)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP32])
def test_two_four_is_claimed_for_the_layers_that_have_it_and_stays_intact(tiny, images, tmp_path, precision):
    import copy

    sparse = copy.deepcopy(tiny)
    with torch.no_grad():
        for layer in (sparse.a.conv1, sparse.c.conv2):
            layer.weight[:, 0::4] = 0
            layer.weight[:, 3::4] = 0
    asked = replace(request(sparse, images, tmp_path, precision), pattern=Pattern.TWO_FOUR)
    artifact = jetson.TARGET.build(asked)
    model = onnx.load(tmp_path / artifact.file.path)
    assert artifact.options["two_four_layers"] == "2"
    assert {p.key: p.value for p in model.metadata_props}[SPARSITY_KEY] == "enable"
    assert lint(model, two_four={"a.conv1", "c.conv2"}) == ()
    baseline = onnx.load(tmp_path / artifact.baseline.path)
    assert {p.key: p.value for p in baseline.metadata_props}[SPARSITY_KEY] == "disable"


def test_an_engine_does_not_run_here_and_a_broken_file_is_named(tmp_path):
    (tmp_path / "model.engine").write_bytes(b"\0")
    with pytest.raises(BuildError, match="the board it was built on"), jetson.TARGET.runner(tmp_path / "model.engine"):
        pass
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(BuildError, match="no ONNX model"), jetson.TARGET.runner(tmp_path / "model.onnx"):
        pass


def test_what_the_runner_answers_is_never_called_measured():
    assert jetson.TARGET.simulation is Kind.ESTIMATED
    assert jetson.TARGET.needs_device


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP16])
def test_candidates_are_files_tensorrt_takes(tiny, precision):
    prober = UnitProber(nets.checked_of(tiny, SHAPE), jetson.TARGET, image_signature(SHAPE), precision, pytest.fail)
    model = onnx.load_model_from_string(prober.candidate(Structure({"b.conv1": (8, 16)}, ("block:c.conv2",))))
    assert lint(model) == ()
    weights = {i.name: tuple(i.dims) for i in model.graph.initializer}
    assert weights["b.conv1.weight"] == (8, 8, 3, 3)
    assert "c.conv2.weight" not in weights
    kind = numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == "b.conv1.weight")).dtype
    assert kind == (np.float16 if precision is Precision.FP16 else np.float32)


def test_an_estimate_is_a_share_that_falls_with_what_is_removed(tiny):
    whole = jetson.TARGET.prober(tiny, image_signature(SHAPE), Precision.INT8)
    assert isinstance(whole, Estimator)
    assert whole.estimate(Structure({})) == 1.0
    prober = UnitProber(nets.checked_of(tiny, SHAPE), jetson.TARGET, image_signature(SHAPE), Precision.INT8, pytest.fail)
    assert prober.estimate(Structure({})) == 1.0
    narrower = prober.estimate(Structure({"b.conv1": (8, 16)}))
    without = prober.estimate(Structure({}, ("block:c.conv2",)))
    assert without < narrower <= 1.0  # a network this small is all floor: only layers that are gone save anything
    assert prober.estimate(Structure({}, ("block:c.conv2", "block:d.conv2"))) < without


@given(st.integers(0, 10**10), st.integers(0, 10**9), st.integers(1, 100))
def test_a_layer_never_takes_less_than_its_floor_nor_less_than_a_smaller_one(macs, values, more):
    for precision in OPERATIONS_PER_S:
        one = seconds([Work(macs, values)], precision)
        assert one >= FLOOR_S
        assert seconds([Work(macs * more, values * more)], precision) >= one
        assert seconds([Work(macs, values)] * 3, precision) == pytest.approx(3 * one)
