"""What stands for trtexec where only a Python package is, against NVIDIA's own library where that is installed (TensorRT-RTX)."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from edge_compress.devices.tensorrt import loop as tensorrt_loop
from edge_compress.devices.tensorrt import trtexec
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.options import Precision
from onnx import TensorProto, helper, numpy_helper

ABSENT = find_spec("tensorrt_rtx_bindings") is None
pytestmark = pytest.mark.skipif(ABSENT, reason="TensorRT-RTX is not installed: pip install 'edge-compress[trt-check]'")


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """Runs it with TensorRT-RTX under TensorRT's name; its own warnings about what it leaves out are not ours."""
    (tmp_path / "tensorrt.py").write_text("from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    def run(*options):
        done = subprocess.run([sys.executable, tensorrt_loop.__file__, *options], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    return run


def onnx_file(path, kind="Conv"):
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    node = helper.make_node(kind, ["input", "w"] if kind == "Conv" else ["input"], ["logits"])
    ends = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])]
    graph = helper.make_graph([node], "g", ends, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)], [weight])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString())
    return path


def build(path: Path, engine: Path) -> list[str]:
    version = trtexec.Version(11, 0, 0)
    cache, layers = str(engine.with_suffix(".cache")), str(engine.with_suffix(".layers"))
    return trtexec.build_command((), str(path), str(engine), version, Precision.FP32, sparse=False, cache=cache, layers=layers)


def test_it_builds_by_the_options_of_trtexec(loop, tmp_path):
    code, log = loop(*build(onnx_file(tmp_path / "m.onnx"), tmp_path / "m.engine"))
    trtexec.require_passed(log, code, "building")
    assert trtexec.version_of(log) is not None
    assert (tmp_path / "m.engine").stat().st_size > 1000


def test_what_the_parser_refuses_is_an_error_of_the_model(loop, tmp_path):
    code, log = loop(*build(onnx_file(tmp_path / "m.onnx", "NoSuchOperator"), tmp_path / "m.engine"))
    assert code == 1
    with pytest.raises(BuildError):
        trtexec.require_passed(log, code, "building")
    assert not (tmp_path / "m.engine").exists()


def test_an_option_it_does_not_know_is_refused_as_trtexec_does(loop):
    code, log = loop("--loadEngine=m", "--streams=4")
    assert code == 1
    assert "[E] Unknown option: --streams" in log


def test_without_a_gpu_an_engine_does_not_run(loop, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert loop(*build(onnx_file(tmp_path / "m.onnx"), tmp_path / "m.engine"))[0] == 0
    code, log = loop(f"--loadEngine={tmp_path / 'm.engine'}", f"--exportTimes={tmp_path / 't.json'}")
    assert code != 0
    assert "[E]" in log
    assert not (tmp_path / "t.json").exists()
