import hashlib
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.pipeline.errors import BuildError, InputError, UnavailableError
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.reconstruct.gptq import round_weights
from edge_compress.pipeline.signature import Signature, TensorSpec, image_signature
from edge_compress.targets import x86
from edge_compress.targets.base import BuildRequest, Interface, Structure
from edge_compress.targets.onnx import run as onnx_run
from edge_compress.targets.onnx import target as onnx_target
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.graph import Graph
from edge_compress.targets.onnx.int8 import STEPS, Recipe, ends, quantize
from edge_compress.targets.onnx.run import predictor
from onnx import numpy_helper
from torch import nn

SHAPE = (3, 12, 12)
FLOAT_TOP1 = 90.0
ORDER = ["float", "min-max 8", "min-max 7", "p99.999", "p99.99", "entropy", "last float", "first float", "both float"]


def request(tiny, images, folder, precision=Precision.INT8, score=None):
    def agreement(predict):
        with torch.no_grad():
            expected = tiny(torch.from_numpy(images)).numpy().argmax(1)
        return 100.0 * float((predict(images).argmax(1) == expected).mean())

    return BuildRequest(
        module=tiny,
        baseline=x86.TARGET.baseline(tiny, Interface(image_signature(SHAPE), tuple("abcde"))),
        signature=image_signature(SHAPE),
        classes=tuple("abcde"),
        precision=precision,
        calibration=[images[:5], images[5:8]],
        score=score or agreement,
        folder=folder,
        rounded=lambda steps: round_weights(tiny, [images[:8]], steps),
    )


def scripted(figures):
    """A score that gives these figures in turn and counts how often it was asked."""
    asked = []

    def score(predict):
        asked.append(predict)
        return figures[len(asked) - 1]

    return score, asked


def chosen(tiny, tiny_onnx, images, tmp_path, figures):
    score, asked = scripted(figures)
    found = x86._int8(tiny_onnx, request(tiny, images, tmp_path, score=score))
    return found.options, found.notes, found.choices, len(asked)


def test_the_artifact_and_its_baseline_are_files_that_compute_the_network(tiny, images, tmp_path):
    artifact = x86.TARGET.build(request(tiny, images, tmp_path))
    for ref in (artifact.file, artifact.baseline):
        data = (tmp_path / ref.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (ref.size_bytes, ref.sha256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["baseline.onnx", "model.onnx"]
    assert artifact.file.size_bytes < artifact.baseline.size_bytes
    with torch.no_grad():
        expected = tiny(torch.from_numpy(images)).numpy()
    with x86.TARGET.runner(tmp_path / "baseline.onnx") as baseline, x86.TARGET.runner(tmp_path / "model.onnx") as model:
        assert np.abs(baseline(images) - expected).max() < 1e-4
        assert model(images).shape == (len(images), 5)
        assert np.corrcoef(model(images).ravel(), expected.ravel())[0, 1] > 0.98
    stored = onnx.load(tmp_path / "model.onnx")
    assert json.loads(next(p.value for p in stored.metadata_props if p.key == "classes")) == list("abcde")
    assert any(node.op_type == "QuantizeLinear" for node in stored.graph.node)
    assert len(artifact.choices) == 6
    assert artifact.options["activation_type"] == "uint8"
    again = x86.TARGET.build(request(tiny, images, tmp_path))
    assert (again.file, again.baseline) == (artifact.file, artifact.baseline)


def test_float_is_built_without_a_quantizer_and_half_precision_is_refused(tiny, images, tmp_path):
    artifact = x86.TARGET.build(request(tiny, images, tmp_path, Precision.FP32))
    assert artifact.file.sha256 == artifact.baseline.sha256  # nothing was pruned
    assert not any("Quantize" in node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    with pytest.raises(BuildError, match="found fp16"):
        x86.TARGET.build(request(tiny, images, tmp_path, Precision.FP16))


def test_seven_bit_weights_are_taken_where_eight_bits_saturate(tiny, tiny_onnx, images, tmp_path):
    options, _, choices, asked = chosen(tiny, tiny_onnx, images, tmp_path, [90.0, 89.0, 89.9, 89.8, 89.85, 89.7])
    assert (options["ranges"], options["weight_bits"]) == ("min-max", "7")
    assert asked == 6
    assert choices[0] == "float: 90.00 %"
    assert "7-bit weights: 89.80 %" in choices[3]


def test_the_best_ranges_win_but_not_for_a_hundredth_of_a_point(tiny, tiny_onnx, images, tmp_path):
    options, *_ = chosen(tiny, tiny_onnx, images, tmp_path, [90.0, 89.8, 89.81, 89.79, 89.9, 89.91])
    assert (options["ranges"], options["weight_bits"]) == ("percentile-99.99", "8")
    options, *_ = chosen(tiny, tiny_onnx, images, tmp_path, [90.0, 89.8, 89.82, 89.8, 89.8, 89.8])
    assert (options["ranges"], options["weight_bits"]) == ("min-max", "8")


def test_layers_go_back_to_float_only_while_int8_costs_too_much(tiny, tiny_onnx, images, tmp_path):
    bad = [90.0, 88.0, 88.0, 88.0, 88.0, 88.0]
    options, _, choices, asked = chosen(tiny, tiny_onnx, images, tmp_path, [*bad, 88.0, 88.5, 89.9])
    assert (options["excluded"], options["rounding"], asked) == ("stem", "nearest", 9)
    assert choices[-1] == "min-max ranges, 8-bit weights, stem in float: 89.90 %"
    options, notes, _, asked = chosen(tiny, tiny_onnx, images, tmp_path, [*bad, 88.05, 88.1, 88.1, 88.2])
    assert (options["excluded"], options["rounding"], asked) == ("stem,head", "compensated", 10)
    assert any("1.80 points" in note for note in notes)


def test_the_last_layer_of_every_output_may_stay_in_float():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.boxes, self.kinds = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            x = self.body(x).relu()
            return self.boxes(x), self.kinds(x).sigmoid()

    outputs = (TensorSpec("boxes", (4, 10, 10), "float32"), TensorSpec("kinds", (5, 10, 10), "float32"))
    model = export_float(Two().eval(), Signature(image_signature(SHAPE, 5).inputs, outputs))
    first, last = ends(model)
    assert first == "body"
    assert sorted(last) == ["boxes", "kinds"]
    ranges = {name: (-4.0, 4.0) for node in model.graph.node for name in (*node.input, *node.output)}
    layers = dict(Graph(quantize(model, ranges, Recipe("min-max", 8, last))).layers())
    assert {name: layers[name].input[1] for name in last} == {"boxes": "boxes.weight", "kinds": "kinds.weight"}
    assert layers["body"].input[1] != "body.weight"  # behind its DequantizeLinear


def test_without_a_head_the_last_layer_is_the_last_branchs_and_not_every_branchs():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            for branch in self.branches:
                x = x + branch(x)
            return self.norm(x)

    sides = (TensorSpec("tokens", (4, 8)),), (TensorSpec("y", (4, 8)),)
    assert ends(export_float(Stream().eval(), Signature(*sides))) == ("branches.0.0", ("branches.2.2",))


def test_where_weights_cannot_be_rounded_together_it_is_said(tiny, tiny_onnx, images, tmp_path):
    def refuses(steps):
        raise InputError("layer a is called twice")

    asked = request(tiny, images, tmp_path, score=scripted([90.0, 88.0, 88.0, 88.0, 88.0, 88.0, 89.9])[0])
    found = x86._int8(tiny_onnx, replace(asked, rounded=refuses))
    assert "int8: rounding by GPTQ was left out: layer a is called twice" in found.notes
    assert found.options["rounding"] == "nearest"


def test_what_int8_may_cost_is_a_share_where_the_metric_has_its_own_unit(tiny, tiny_onnx, images, tmp_path):
    asked = request(tiny, images, tmp_path, score=scripted([0.9, *[0.89] * 9])[0])
    assert "more than the 0.0027 aimed at" in x86._int8(tiny_onnx, replace(asked, unit="", max_drop=None)).notes[2]


def test_weights_are_rounded_together_before_a_layer_goes_back_to_float(tiny, tiny_onnx, images, tmp_path):
    options, notes, choices, asked = chosen(tiny, tiny_onnx, images, tmp_path, [90.0, 88.0, 88.0, 88.0, 88.0, 88.0, 89.9])
    assert (options["excluded"], options["rounding"], asked) == ("", "compensated", 7)
    assert choices[-1] == "min-max ranges, 8-bit weights rounded by GPTQ: 89.90 %"
    assert "rounded by GPTQ" in notes[0]


@pytest.mark.parametrize("bits", [8, 7])
def test_what_was_rounded_for_the_quantizer_it_takes_as_it_is(tiny, images, bits):
    network = export_float(round_weights(tiny, [images], STEPS[bits]), image_signature(SHAPE))
    quantized = quantize(network, ranges(collect(network, [images]), "min-max"), Recipe("min-max", bits))
    before, after = ({i.name: numpy_helper.to_array(i) for i in model.graph.initializer} for model in (network, quantized))
    seen = 0
    for name, value in before.items():
        if value.ndim > 1 and name.endswith(".weight") and value.shape[1] > 1:  # no depthwise one
            steps, scale = after[f"{name}_quantized"], after[f"{name}_scale"]
            found = steps[:, : value.shape[1]] * scale.reshape(-1, *[1] * (value.ndim - 1))
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-7)
            seen += 1
    assert seen > 1


def test_the_runner_takes_any_number_of_inputs_and_names_a_file_it_cannot_load(tiny_onnx, images, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(tiny_onnx.SerializeToString())
    with x86.TARGET.runner(path) as run:
        whole = run(images[:7])
        assert np.array_equal(whole, np.concatenate([run(images[i : i + 1]) for i in range(7)]))
        assert run(images[:0]).shape == (0, 5)
    path.write_bytes(b"not a network")
    with pytest.raises(BuildError, match=r"cannot load net\.onnx"), x86.TARGET.runner(path):
        pass


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP32])
def test_the_networks_own_file_is_in_the_artifacts_precision_and_no_layer_of_it_is_cut(tiny, precision):
    prober = x86.TARGET.prober(tiny, image_signature(SHAPE), precision)
    whole, baseline = prober.candidate(Structure({})), prober.network.model.SerializeToString()
    weights = {i.name: numpy_helper.to_array(i) for i in onnx.load_from_string(whole).graph.initializer}
    name = "a.conv1.weight_quantized" if precision is Precision.INT8 else "a.conv1.weight"
    assert weights[name].dtype == (np.int8 if precision is Precision.INT8 else np.float32)
    for data in (whole, baseline):
        assert predictor(data)(np.zeros((1, *SHAPE), np.float32)).shape == (1, 5)
    assert not any("Quantize" in node.op_type for node in onnx.load_from_string(baseline).graph.node)
    with pytest.raises(BuildError, match="not cut by its layers"):
        prober.candidate(Structure({"a.conv1": (8, 4), "a.conv2": (4, 8)}))


def test_missing_packages_are_named_before_anything_is_built(tiny, images, tmp_path, monkeypatch):
    assert x86.TARGET.missing() is None
    asked = request(tiny, images, tmp_path)
    for module in (onnx_target, onnx_run):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert "pip install onnxruntime" in x86.TARGET.missing()
    with pytest.raises(UnavailableError, match="onnxruntime"):
        x86.TARGET.build(asked)
    with pytest.raises(UnavailableError), x86.TARGET.runner(tmp_path / "x.onnx"):
        pass


class Ratio(nn.Module):
    """A quotient whose divisor is kept away from zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.top, self.bottom = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.top(x).relu() / self.bottom(x).clamp(min=0.5)


def test_a_divisor_that_is_clamped_above_zero_stays_above_zero_in_int8(images):
    net = Ratio().eval()
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    network = export_float(net, Signature(image_signature(SHAPE).inputs, (TensorSpec("y", expected.shape[1:]),)))
    quantized = quantize(network, ranges(collect(network, [images]), "min-max"), Recipe("min-max", 7))
    found = predictor(quantized.SerializeToString())(images)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < 0.05 * np.ptp(expected)


def test_a_recipe_whose_score_is_no_number_is_not_taken(tiny, tiny_onnx, images, tmp_path):
    nan = float("nan")
    options, *_ = chosen(tiny, tiny_onnx, images, tmp_path, [90.0, nan, 89.9, nan, 89.0, nan])
    assert (options["ranges"], options["weight_bits"]) == ("min-max", "7")
    for figures, said in (([90.0, *[nan] * 9], "every int8 network.*NaN"), ([nan, *[89.0] * 9], "found nan")):
        with pytest.raises(BuildError, match=said):
            chosen(tiny, tiny_onnx, images, tmp_path, figures)
