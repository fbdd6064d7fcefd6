"""What stands for trtexec where only a Python package is, against NVIDIA's own library where that is installed (TensorRT-RTX)."""

import json
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from edge_compress.devices.tensorrt import loop as tensorrt_loop
from edge_compress.devices.tensorrt import trtexec
from edge_compress.pipeline.errors import BuildError, install_hint
from edge_compress.pipeline.options import Precision
from onnx import TensorProto, helper, numpy_helper

ABSENT = find_spec("tensorrt_rtx_bindings") is None
needs_tensorrt = pytest.mark.skipif(ABSENT, reason=f"TensorRT-RTX is not installed: {install_hint('trt-check')}")


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


@needs_tensorrt
def test_it_builds_by_the_options_of_trtexec(loop, tmp_path):
    code, log = loop(*build(onnx_file(tmp_path / "m.onnx"), tmp_path / "m.engine"))
    trtexec.require_passed(log, code, "building")
    assert trtexec.version_of(log) is not None
    assert (tmp_path / "m.engine").stat().st_size > 1000


@needs_tensorrt
def test_what_the_parser_refuses_is_an_error_of_the_model(loop, tmp_path):
    code, log = loop(*build(onnx_file(tmp_path / "m.onnx", "NoSuchOperator"), tmp_path / "m.engine"))
    assert code == 1
    with pytest.raises(BuildError):
        trtexec.require_passed(log, code, "building")
    assert not (tmp_path / "m.engine").exists()


@needs_tensorrt
def test_an_option_it_does_not_know_is_refused_as_trtexec_does(loop):
    code, log = loop("--loadEngine=m", "--streams=4")
    assert code == 1
    assert "[E] Unknown option: --streams" in log


@needs_tensorrt
def test_without_a_gpu_an_engine_does_not_run(loop, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert loop(*build(onnx_file(tmp_path / "m.onnx"), tmp_path / "m.engine"))[0] == 0
    code, log = loop(f"--loadEngine={tmp_path / 'm.engine'}", f"--exportTimes={tmp_path / 't.json'}")
    assert code != 0
    assert "[E]" in log
    assert not (tmp_path / "t.json").exists()


class _Gpu:
    """A stand-in for the CUDA runtime: memory is bytes, and an inference what the engine's function makes of them."""

    def __init__(self):
        self.stored = {}

    def made(self, name):
        return types.SimpleNamespace(value=0)

    def memory(self, size):
        self.stored[len(self.stored)] = bytes(size)
        return types.SimpleNamespace(value=len(self.stored) - 1)

    def call(self, name, *arguments):
        pass

    def copy(self, target, source, size, *, to_gpu):
        if to_gpu:
            assert len(source) == size
            self.stored[target.value] = source
        else:
            target.raw = self.stored[source.value]


def engine_of(monkeypatch):
    """TensorRT with one engine: image (3 floats) and words (2 integers) to their sum (float), and the words (integers)."""
    gpu = _Gpu()
    tensors = {"words": ("INT64", (1, 2)), "sum": ("FLOAT", (1, 1)), "image": ("FLOAT", (1, 3)), "same": ("INT64", (1, 2))}
    places = {}

    def execute(stream):
        image, words = np.frombuffer(gpu.stored[places["image"]], "<f4"), np.frombuffer(gpu.stored[places["words"]], "<i8")
        gpu.stored[places["sum"]] = np.float32(image.sum() + words.sum()).tobytes()
        gpu.stored[places["same"]] = words.tobytes()
        return True

    engine = types.SimpleNamespace(
        num_io_tensors=4,
        get_tensor_name=[*tensors].__getitem__,
        get_tensor_dtype=lambda name: tensors[name][0],
        get_tensor_shape=lambda name: tensors[name][1],
        get_tensor_mode=lambda name: "in" if name in ("image", "words") else "out",
        create_execution_context=lambda: types.SimpleNamespace(set_tensor_address=places.__setitem__, execute_async_v3=execute),
    )
    monkeypatch.setattr(tensorrt_loop, "Cuda", lambda: gpu)
    return types.SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None}),
        Runtime=lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda data: engine),
        DataType=types.SimpleNamespace(FLOAT="FLOAT", INT64="INT64"),
        TensorIOMode=types.SimpleNamespace(INPUT="in"),
        __version__="10.3.0",
    )


def test_several_inputs_and_outputs_lie_one_sample_after_another(tmp_path, monkeypatch):
    trt = engine_of(monkeypatch)
    tensors = [["image", "float32", 12], ["words", "int64", 16], ["sum", "float32", 4], ["same", "int64", 16]]
    images, words = np.arange(6, dtype="<f4").reshape(2, 3), np.array([[10, 20], [30, 40]], "<i8")
    (tmp_path / "in").write_bytes(b"".join(a.tobytes() + b.tobytes() for a, b in zip(images, words, strict=True)))
    (tmp_path / "m.engine").write_bytes(b"")
    options = {"--loadEngine": str(tmp_path / "m.engine"), "--inputs": str(tmp_path / "in"), "--outputs": str(tmp_path / "out")}
    tensorrt_loop.answered(trt, options | {"--tensors": json.dumps(tensors)})
    rows = np.frombuffer((tmp_path / "out").read_bytes(), [("sum", "<f4"), ("same", "<i8", 2)])
    assert rows["sum"].tolist() == [33.0, 82.0]
    assert rows["same"].tolist() == words.tolist()
    tensors[1][1:] = ["int32", 8]
    with pytest.raises(OSError, match="the engine's tensors are"):
        tensorrt_loop.answered(trt, options | {"--tensors": json.dumps(tensors)})
