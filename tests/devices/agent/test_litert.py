"""LiteRT behind the agent: the package that works is taken, whatever the others do; a real file gives real outputs."""

import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from edge_compress.devices.board import Board
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.remote import RemoteDevice
from edge_compress.devices.transport.ssh import SshTransport
from edge_compress.pipeline.errors import BuildError, DeviceError, UnavailableError
from edge_compress.pipeline.signature import image_signature

QUICK = TimingSettings(runtime="litert", sessions=1, min_pairs=5, max_pairs=10, max_seconds=5.0, warmup_seconds=0.1)
# A package that computes y = 2 x, as far as the agent can tell.
WORKS = """
import numpy
class Interpreter:
    def __init__(self, model_path, num_threads):
        if b"broken" in open(model_path, "rb").read(): raise ValueError("this is no model")
        self.x = None
    def allocate_tensors(self): pass
    def get_input_details(self): return [{"name": "x", "index": 0, "shape": numpy.array([1, 4]), "dtype": numpy.float32}]
    def get_output_details(self): return [{"name": "y", "index": 1}]
    def set_tensor(self, index, value):
        if value.shape != (1, 4): raise ValueError("Dimension mismatch")
        self.x = value
    def invoke(self): self.y = 2 * self.x
    def get_tensor(self, index): return self.y
"""
FAILS = {
    "is not there": None,
    "cannot be imported": "raise ImportError('GLIBC_2.34 not found')",
    "kills its process": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    "was built for another numpy": WORKS.replace("def invoke(self): ", "def invoke(self): raise AttributeError('_ARRAY_API'); "),
}


@pytest.fixture
def board(standin, tmp_path):
    """Makes a board whose Python has some packages of its own."""

    def make(**packages: str | None) -> RemoteDevice:
        folder = tmp_path / "packages"
        for name, code in packages.items():
            if code is not None:
                (folder / name).mkdir(parents=True)
                (folder / name / "__init__.py").write_text("__version__ = '2.0'\n")
                (folder / name / "interpreter.py").write_text(code)
        python = tmp_path / "python3"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return RemoteDevice(Board("pi", ("phone",), "ssh", address="pi", python=str(python)), SshTransport("pi", "pi"))

    return make


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "m.tflite"
    path.write_bytes(b"a model")
    return path


@pytest.mark.parametrize("code", FAILS.values(), ids=FAILS)
def test_the_package_that_works_is_taken(board, model, code):
    with board(ai_edge_litert=code, tflite_runtime=WORKS).connect() as agent:
        loaded = agent.load(model, "litert", 1)
        assert loaded.package == "tflite_runtime"
        x = np.arange(4, dtype=np.float32)[None]
        np.testing.assert_array_equal(loaded.run({"x": x})["y"], 2 * x)


def test_the_newer_package_comes_first_and_its_process_serves_the_model_beside(board, model):
    with board(ai_edge_litert=WORKS, tflite_runtime=WORKS).connect() as agent:
        loaded = agent.load(model, "litert", 1)
        assert (loaded.package, loaded.version) == ("ai_edge_litert", "2.0")
        beside = agent.load(model, "litert", 1, None, loaded)
        assert (beside.pid, beside.package) == (loaded.pid, "ai_edge_litert")
        beside.unload()
        assert agent.load(model, "litert", 1).pid != loaded.pid


def test_without_a_package_that_works_the_reasons_are_given(board, model):
    with board(ai_edge_litert=FAILS["cannot be imported"]).connect() as agent:
        with pytest.raises(UnavailableError, match=r"GLIBC_2\.34 not found.*tflite_runtime: No module"):
            agent.load(model, "litert", 1)
        with pytest.raises(UnavailableError, match="GLIBC"):
            agent.runtime("litert")


def test_a_model_that_no_package_takes_is_the_models_fault(board, model):
    model.write_bytes(b"broken")
    both = board(ai_edge_litert=WORKS, tflite_runtime=WORKS)
    with both.connect() as agent, pytest.raises(BuildError, match="this is no model"):
        agent.load(model, "litert", 1)


def test_a_process_that_dies_while_it_loads_says_how_when_there_is_no_other_package(board, model):
    with board(ai_edge_litert=FAILS["kills its process"]).connect() as agent, pytest.raises(DeviceError, match="SIGILL"):
        agent.load(model, "litert", 1)


def test_it_has_no_times_by_layer_and_says_so(board, model):
    with board(ai_edge_litert=WORKS).connect() as agent:
        loaded = agent.load(model, "litert", 1)
        with pytest.raises(UnavailableError, match="no profiler"):
            loaded.layers(10, 20.0)
        assert loaded.peak_rss_bytes() > 10**7


def test_measured_over_the_stand_in(board, model):
    assert board(ai_edge_litert=WORKS).measure(model, model, QUICK).environment["runtime_version"] == "2.0"


@pytest.mark.slow
def test_a_real_file_gives_what_this_machines_interpreter_gives(tmp_path):
    pytest.importorskip("litert_torch", reason="the extra [phone] makes the file")
    import torch
    from edge_compress.targets.tflite.convert import convert
    from edge_compress.targets.tflite.run import predictor

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5))
    data, _ = convert(net.eval(), image_signature((3, 8, 8)), (), ())
    path = tmp_path / "m.tflite"
    path.write_bytes(data)
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    with LocalDevice().connect() as agent:
        loaded = agent.load(path, "litert", 1)
        assert loaded.package == "ai_edge_litert"
        np.testing.assert_array_equal(predictor(data, infer=loaded.run)(images), predictor(data)(images))
