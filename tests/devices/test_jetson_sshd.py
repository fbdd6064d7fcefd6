"""Engines over a real sshd: the stand-in for trtexec lies on the PATH of its sessions. No time ever comes from it, except where a
test takes the stamp away."""

import json
import subprocess
import sys
from pathlib import Path

import peers
import pytest
from edge_compress.devices.board import Board
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.tensorrt import engines as engines_file
from edge_compress.devices.tensorrt import trtexec
from edge_compress.devices.tensorrt.device import TensorRtDevice
from edge_compress.devices.transport.ssh import SshTransport
from edge_compress.pipeline.errors import DeviceError, UnavailableError
from edge_compress.pipeline.types import Kind
from jetsons import MODE, Programs, digest, onnx_file

pytestmark = pytest.mark.devices
SETTINGS = TimingSettings(sessions=2, min_pairs=10, max_pairs=20, runtime="tensorrt")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("jetson") / "bin")


@pytest.fixture(scope="module")
def server(tmp_path_factory, programs):
    with peers.loopback(tmp_path_factory.mktemp("sshd"), f"SetEnv PATH={programs.folder}:/usr/bin:/bin\n") as found:
        yield found


@pytest.fixture
def device(server, programs, tmp_path):
    """A board with nothing on it yet."""
    programs.put("nvpmodel", MODE)
    programs.told = {}
    programs.tell(version="100300")
    folder = str(tmp_path / "board")
    board = Board("loop", ("jetson",), "ssh", runtime="tensorrt", address="loop", python=sys.executable, folder=folder)
    found = TensorRtDevice(board, SshTransport("loop", "loop", folder, server.config))
    yield found
    found.close()


def built_with(engine):
    """The options that an engine was built with, from its file."""
    return set(json.loads(Path(engine).read_bytes().partition(b"\n")[2])["options"])


@pytest.mark.parametrize(
    ("number", "version", "given"),
    [("100300", "10.3.0", {"--fp16", "--int8"}), ("110000", "11.0.0", set()), ("110401", "11.4.1", set())],
)
def test_an_engine_is_built_over_ssh_with_the_flags_of_the_boards_version_and_comes_here(
    device, programs, tmp_path, number, version, given
):
    programs.tell(version=number)
    path = onnx_file(tmp_path / "m.onnx", quantized=True)
    with device.engines() as engines:
        assert str(engines.version) == version
        engine = engines.engine(path)
        engines.fetch(engine, tmp_path / "m.engine")
    assert built_with(tmp_path / "m.engine") & {"--fp16", "--int8", "--stronglyTyped"} == given
    assert {"--skipInference", "--timingCacheFile", "--profilingVerbosity"} <= built_with(tmp_path / "m.engine")
    assert (tmp_path / "m.engine").read_bytes().startswith(trtexec.SIMULATED)
    assert f"tensorrt-{version}-15W" in engine.path


def test_a_flag_that_the_boards_version_does_not_know_is_said_to_be_our_mistake(device, programs, tmp_path, monkeypatch):
    programs.tell(version="110401")
    monkeypatch.setattr(trtexec, "precision_flags", lambda version, precision: ("--fp16",))
    with device.engines() as engines, pytest.raises(DeviceError, match=r"Unknown option: --fp16.*mistake of ours"):
        engines.engine(onnx_file(tmp_path / "m.onnx"))


def test_kernel_timings_stay_on_the_board_for_the_next_build_of_another_connection(device, programs, tmp_path):
    files = [onnx_file(tmp_path / f"{n}.onnx", channels=n) for n in (4, 8, 12)]
    for file in files[:2]:
        with device.engines() as engines:
            engines.engine(file)
            folder = Path(engines.folder)
    programs.put("nvpmodel", MODE.replace("15W", "MAXN"))
    with device.engines() as engines:
        engines.engine(files[2])
        other = Path(engines.folder)
    kept = [(place / "timing.cache").read_text() for place in (folder, other)]
    assert kept == [digest(files[0])[:8] + digest(files[1])[:8], digest(files[2])[:8]]


def test_a_stamped_engine_is_not_timed_and_one_that_counts_is_timed_in_turns(device, programs, tmp_path, monkeypatch):
    dense, small = onnx_file(tmp_path / "dense.onnx", channels=16), onnx_file(tmp_path / "small.onnx", quantized=True)
    programs.tell(times_ms={digest(dense): 6.0, digest(small): 2.0})
    with pytest.raises(UnavailableError, match="stamped simulated"):
        device.measure(dense, small, SETTINGS)
    monkeypatch.setattr(trtexec, "SIMULATED", b"another stamp")
    timing = device.measure(dense, small, SETTINGS)
    assert timing.speedup.median == pytest.approx(3.0, rel=0.01)
    assert (timing.kind, timing.device) == (Kind.MEASURED, "loop")
    assert timing.environment["runtime_version"] == "tensorrt 10.3.0"


def test_a_build_that_hangs_is_ended_on_the_board_too(device, programs, tmp_path, monkeypatch):
    monkeypatch.setattr(engines_file, "_BUILD_S", 2.0)
    programs.tell(hang=300)
    with device.engines() as engines:
        with pytest.raises(DeviceError, match="no end after 2 s"):
            engines.engine(onnx_file(tmp_path / "m.onnx"))
        here = str(programs.folder / "trtexec")
        running = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
        assert not [line for line in running.splitlines() if here in line and "--onnx" in line]
        programs.tell(hang=0)
        assert engines.engine(onnx_file(tmp_path / "m.onnx")).simulated
