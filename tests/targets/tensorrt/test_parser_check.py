"""NVIDIA's parser and builder, where they are installed: what we build is taken, and what the linter refuses is refused."""

import copy

import numpy as np
import pytest
from edge_compress.calibration.ranges import collect, ranges
from edge_compress.pipeline.errors import UnavailableError
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.onnx.export import export_float
from edge_compress.targets.onnx.int8 import Recipe
from edge_compress.targets.onnx.int8 import quantize as quantize_x86
from edge_compress.targets.tensorrt import parser_check as tensorrt_check
from edge_compress.targets.tensorrt.lint import lint
from edge_compress.targets.tensorrt.qdq import quantize
from onnx import numpy_helper

MINMAX = Recipe("min-max", 8)
LACKING = tensorrt_check.missing()
installed = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))


@pytest.fixture(scope="module")
def seen(tiny_onnx, images):
    return ranges(collect(tiny_onnx, [images[:4]]), "min-max")


def test_without_it_the_check_is_unavailable_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tensorrt_check, "MODULE", "no_such_module")
    assert "trt-check" in tensorrt_check.missing()
    with pytest.raises(UnavailableError, match="not installed"):
        tensorrt_check.check(b"")


@installed
def test_our_graph_is_accepted_and_built(tiny_onnx, seen):
    verdict = tensorrt_check.check(quantize(tiny_onnx, seen, MINMAX).SerializeToString())
    assert (verdict.accepted, verdict.built, verdict.messages) == (True, True, ())
    assert verdict.engine_bytes > 1000
    assert "engine built" in str(verdict)


def unsigned(model):
    """Zero points of the image's pair as uint8."""
    pair = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "input")
    back = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == pair.output[0])
    model.graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), "unsigned"))
    pair.input[2] = back.input[2] = "unsigned"


def shifted(model):
    pair = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "input")
    back = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == pair.output[0])
    model.graph.initializer.append(numpy_helper.from_array(np.array(3, np.int8), "shifted"))
    pair.input[2] = back.input[2] = "shifted"


@installed
@pytest.mark.parametrize("broken", [unsigned, shifted])
def test_what_the_linter_refuses_the_parser_refuses(tiny_onnx, seen, broken):
    model = copy.deepcopy(quantize(tiny_onnx, seen, MINMAX))
    broken(model)
    assert lint(model)
    verdict = tensorrt_check.check(model.SerializeToString())
    assert (verdict.accepted, verdict.built) == (False, False)
    assert verdict.messages
    assert str(verdict).startswith("refused")


@installed
def test_the_x86_file_is_refused(tiny_onnx, seen):
    assert not tensorrt_check.check(quantize_x86(tiny_onnx, seen, MINMAX).SerializeToString()).accepted


@installed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_networks_of_torchvision_are_accepted_and_built(name):
    import torch
    import torchvision

    torch.manual_seed(0)
    model = export_float(torchvision.models.get_model(name).eval(), image_signature((3, 224, 224)))
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    quantized = quantize(model, ranges(collect(model, [images]), "min-max"), MINMAX)
    assert lint(quantized) == ()
    verdict = tensorrt_check.check(quantized.SerializeToString())
    assert (verdict.accepted, verdict.built) == (True, True), str(verdict)


def test_a_check_that_crashes_or_hangs_takes_nothing_with_it(tmp_path, monkeypatch):
    (tmp_path / "tensorrt_rtx_bindings.py").write_text("import os, sys, time\nexec(open(os.environ['SCENE']).read())\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(tmp_path)
    scene = tmp_path / "scene"
    monkeypatch.setenv("SCENE", str(scene))
    for script, told in (
        ("os.kill(os.getpid(), 11)", "signal 11"),
        ("sys.exit('no library')", "exit code 1 .no library"),
        ("time.sleep(60)", "no answer after 3 s"),
    ):
        scene.write_text(script)
        with pytest.raises(UnavailableError, match=told):
            tensorrt_check.check(b"", deadline_s=3.0)
