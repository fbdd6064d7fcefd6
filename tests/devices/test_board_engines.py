"""Engines on a pretended Jetson: a stand-in for trtexec behind a stand-in for ssh. No time ever comes from it, except where a
test takes the stamp away to see what lies behind."""

import contextlib
import hashlib
import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from edge_compress.devices import board as boards
from edge_compress.devices import leases
from edge_compress.devices.access import open_board
from edge_compress.devices.board import Board
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.remote import RemoteDevice
from edge_compress.devices.tensorrt import engines as engines_file
from edge_compress.devices.tensorrt import loop as tensorrt_loop
from edge_compress.devices.tensorrt import trtexec
from edge_compress.devices.tensorrt.device import TensorRtDevice
from edge_compress.devices.tensorrt.engines import IOTensors
from edge_compress.devices.transport.base import BusyError
from edge_compress.pipeline.errors import BuildError, DeviceError, UnavailableError
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.profile import board_check, profiling
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.signature import FileTensor
from edge_compress.pipeline.types import Kind
from jetsons import MODE, digest, onnx_file

IO = IOTensors((FileTensor("input", (1, 3, 2, 2)),), (FileTensor("logits", (1, 10)),))
SETTINGS = TimingSettings(sessions=3, min_pairs=10, max_pairs=40, runtime="tensorrt")
BOARD = 'targets = ["jetson"]\ntransport = "ssh"\nruntime = "tensorrt"\naddress = "nano"\npython = "{python}"\n'


@pytest.fixture
def device(jetson):
    board = Board("nano", ("jetson",), "ssh", runtime="tensorrt", address="nano", python=sys.executable)
    found = open_board(board)
    assert isinstance(found, TensorRtDevice)
    yield found
    found.close()


def test_a_board_of_another_runtime_is_no_tensorrt_device(standin):
    other = open_board(Board("pi", ("x86",), "ssh", address="pi"))
    assert type(other) is RemoteDevice
    other.close()


def test_precision_and_sparse_kernels_are_read_from_the_file(tmp_path):
    path = tmp_path / "m.onnx"
    assert engines_file.asked_of(onnx_file(path)) == (Precision.FP32, False)
    assert engines_file.asked_of(onnx_file(path, quantized=True, sparse=True)) == (Precision.INT8, True)
    assert engines_file.asked_of(onnx_file(path, half=True)) == (Precision.FP16, False)


@pytest.mark.parametrize(("version", "flags"), [("100300", ["--fp16", "--int8"]), ("110401", [])])
def test_an_engine_is_built_with_the_flags_of_the_boards_version_and_once(device, jetson, tmp_path, version, flags):
    jetson.tell(version=version)
    path = onnx_file(tmp_path / "m.onnx", quantized=True)
    with device.engines() as engines:
        assert str(engines.version) == {"100300": "10.3.0", "110401": "11.4.1"}[version]
        first = engines.engine(path)
        again = engines.engine(path)
    (build,) = jetson.commands("--onnx=")
    assert [flag for flag in ("--fp16", "--int8") if flag in build.split()] == flags
    assert "--sparsity=disable" in build
    assert first == again
    assert first.simulated
    assert (jetson.standin.home / first.path).read_bytes().startswith(trtexec.SIMULATED)


def test_a_file_that_is_an_engine_is_used_as_it_is_and_a_stamped_one_is_known_by_its_stamp(device, jetson, tmp_path, monkeypatch):
    dense, small = onnx_file(tmp_path / "dense.onnx", channels=16), onnx_file(tmp_path / "small.onnx")
    files = [tmp_path / "dense.engine", tmp_path / "small.engine"]
    with device.engines() as engines:
        for source, file in zip((dense, small), files, strict=True):
            engines.fetch(engines.engine(source), file)
        assert engines.engine(files[0]).simulated
    with pytest.raises(UnavailableError, match="stamped simulated"):
        device.measure(*files, SETTINGS)
    monkeypatch.setattr(trtexec, "SIMULATED", b"another stamp")
    jetson.tell(times_ms={digest(dense): 6.0, digest(small): 2.0})
    assert device.measure(*files, replace(SETTINGS, sessions=1)).speedup.median == pytest.approx(3.0, rel=0.01)
    assert len(jetson.commands("--onnx=")) == 2  # nothing was built again


def test_kernel_timings_are_kept_for_a_version_and_a_power_mode(device, jetson, tmp_path):
    path, other = onnx_file(tmp_path / "m.onnx"), onnx_file(tmp_path / "n.onnx", channels=8)
    with device.engines() as engines:
        engines.engine(path)
        engines.engine(other)
    jetson.put("nvpmodel", MODE.replace("15W", "MAXN"))
    with device.engines() as engines:
        engines.engine(path)
    caches = [part for call in jetson.commands("--onnx=") for part in call.split() if part.startswith("--timingCacheFile=")]
    assert caches[0] == caches[1] != caches[2]
    assert "10.3.0-15W" in caches[0]
    assert "10.3.0-MAXN" in caches[2]
    kept = jetson.standin.home / caches[0].partition("=")[2]
    assert kept.read_bytes() == (digest(path)[:8] + digest(other)[:8]).encode()  # the second build went on with the first's


def test_from_a_simulated_engine_no_time_no_layer_no_output_and_no_power_comes(device, jetson, tmp_path):
    path = onnx_file(tmp_path / "m.onnx")
    with device.engines() as engines:
        engine = engines.engine(path)
        for ask in (
            lambda: engines.times_ms(engine, 10),
            lambda: engines.layers(engine),
            lambda: engines.outputs(engine, [np.zeros((1, 3, 2, 2), np.float32)], IO),
            lambda: engines.power(engine),
        ):
            with pytest.raises(UnavailableError, match="stamped simulated"):
                ask()
    with contextlib.closing(device.meter(path.read_bytes(), "tensorrt", 1, 0)) as meter:
        for measure in (
            lambda: device.measure(path, path, SETTINGS),
            lambda: device.sessions(path, [path], SETTINGS),
            lambda: meter.ratio(path.read_bytes()),
            lambda: meter.dense_ms,
        ):
            with pytest.raises(UnavailableError, match="stamped simulated"):
                measure()
    assert not jetson.commands("--exportTimes=")  # it is not even timed


def test_engines_take_turns_and_the_ratio_is_theirs(device, jetson, tmp_path, real):
    dense, small = onnx_file(tmp_path / "dense.onnx", channels=16), onnx_file(tmp_path / "small.onnx", quantized=True)
    jetson.tell(times_ms={digest(dense): 6.0, digest(small): 2.0}, unstable=True)
    timing = device.measure(dense, small, SETTINGS)
    assert timing.speedup.median == pytest.approx(3.0, rel=0.01)
    assert (timing.kind, timing.device, timing.sessions) == (Kind.MEASURED, "nano", 3)
    assert timing.dense.p50_ms == pytest.approx(6.0, rel=0.01)
    assert timing.noise_floor < 0.01
    facts = timing.environment
    assert (facts["runtime_version"], facts["power_mode"], facts["gpu"]) == ("tensorrt 10.3.0", "15W", "Orin")
    assert "coefficient of variance" in facts["trtexec_warns"]
    order = [call.partition("--loadEngine=")[2].split()[0] for call in jetson.commands("--exportTimes=")]
    a, b = order[0], order[1]
    assert order[:8] == [a, b, b, a, b, a, a, b]  # there and back, and the other way round in the next session
    assert all("--useCudaGraph" in c and "--noDataTransfers" in c for c in jetson.commands("--exportTimes="))


def test_candidates_of_a_search_leave_nothing_behind(device, jetson, tmp_path, real):
    dense = onnx_file(tmp_path / "dense.onnx", channels=16).read_bytes()
    candidate = onnx_file(tmp_path / "c.onnx", channels=8).read_bytes()
    jetson.tell(times_ms={hashlib.sha256(dense).hexdigest(): 4.0, hashlib.sha256(candidate).hexdigest(): 1.0})
    meter = device.meter(dense, "tensorrt", 1, 0)
    assert meter.ratio(candidate).value == pytest.approx(0.25, rel=0.01)
    assert meter.dense_ms == pytest.approx(4.0, rel=0.01)
    meter.close()
    assert len(list(jetson.standin.home.rglob("*.engine"))) == 1  # the baseline's


def test_layers_come_from_the_profiler_in_a_run_of_its_own(device, jetson, tmp_path, real):
    with device.engines() as engines:
        layers = engines.layers(engines.engine(onnx_file(tmp_path / "m.onnx")))
    assert [layer.average_ms for layer in layers] == [0.0492, 0.03]
    assert "--separateProfileRun" in jetson.commands("--exportProfile=")[0]


def test_sparse_layers_are_reported_as_eligible_and_picked(device, jetson, tmp_path):
    jetson.tell(eligible=["a", "b"], picked=["b"])
    with device.engines() as engines:
        found = engines.engine(onnx_file(tmp_path / "m.onnx", sparse=True)).sparsity
        assert engines.engine(onnx_file(tmp_path / "m.onnx", sparse=True)).sparsity == found  # without building it again
    assert (found.eligible, found.picked) == (("a", "b"), ("b",))
    assert "--sparsity=enable" in jetson.commands("--onnx=")[0]


def test_without_tensorrt_in_the_boards_python_images_go_one_by_one(device, jetson, tmp_path, real):
    images = np.arange(3 * 12, dtype=np.float32).reshape(3, 3, 2, 2)
    jetson.put("python3", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no packages: no TensorRT
    with device.engines() as engines:
        assert not engines.in_bulk()
        engine = engines.engine(onnx_file(tmp_path / "m.onnx"))
        (answers,) = engines.outputs(engine, [images], IO)
        expected = [sum(image.astype("<f4").tobytes()) % 10 for image in images]
        assert answers.argmax(1).tolist() == expected
        assert answers.shape == (3, 10)
        words = np.array([[1, 2], [3, 4], [5, 6]])
        several = IOTensors(
            (*IO.inputs, FileTensor("words", (1, 2), dtype="int64")), (*IO.outputs, FileTensor("count", (1, 1, 1)))
        )
        answers, count = engines.outputs(engine, [images, words], several)
        assert answers.argmax(1).tolist() == [(was + sum(row)) % 10 for was, row in zip(expected, words, strict=True)]
        assert count.tolist() == [[[2.0]]] * 3
        with pytest.raises(DeviceError, match="10 values of logits"):
            engines.outputs(engine, [images], IOTensors(IO.inputs, (FileTensor("logits", (1, 9)),)))


PYTHON_WITH_TENSORRT = """#!/bin/sh
exec {python} - "$@" <<'END'
import struct, sys
if sys.argv[2:] == ["--help"]: sys.exit(0)
options = dict(a.split("=", 1) for a in sys.argv[2:])
data = open(options["--inputs"], "rb").read()
rows = [data[i : i + 56] for i in range(0, len(data), 56)]  # twelve floats, one int64
assert options["--tensors"].count("[") == 5, options
answers = [struct.pack("<qff", struct.unpack("<q", r[48:])[0] + 1, *2 * struct.unpack("<f", r[:4])) for r in rows]
open(options["--outputs"], "wb").write(b"".join(answers){cut})
print("&&&& PASSED TensorRT.python [TensorRT v100300]")
END
"""


def test_where_python_knows_tensorrt_all_samples_go_in_files(device, jetson, tmp_path, real, monkeypatch):
    monkeypatch.setattr(engines_file, "_CHUNK_BYTES", 120)  # two samples at a time
    images = np.random.default_rng(0).standard_normal((5, 3, 2, 2)).astype(np.float32)
    jetson.put("python3", PYTHON_WITH_TENSORRT.format(python=sys.executable, cut=""))
    with device.engines() as engines:
        engine = engines.engine(onnx_file(tmp_path / "m.onnx"))
        words = np.arange(5)[:, None]
        io = IOTensors(
            (*IO.inputs, FileTensor("words", (1, 1), dtype="int64")),
            (FileTensor("next", (1,), dtype="int64"), FileTensor("logits", (1, 2))),
        )
        following, answers = engines.outputs(engine, [images, words], io)
        np.testing.assert_array_equal(answers[:, 0], images[:, 0, 0, 0])
        assert answers.shape == (5, 2)
        assert following.tolist() == [1, 2, 3, 4, 5]
        assert following.dtype == np.int64
        assert len(jetson.commands("--inputs=")) == 3
        jetson.put("python3", PYTHON_WITH_TENSORRT.format(python=sys.executable, cut="[:-4]"))
        with pytest.raises(DeviceError, match="cut off"):
            engines.outputs(engine, [images, words], io)


def test_power_is_read_beside_a_run_of_its_own(device, jetson, tmp_path, real, monkeypatch):
    monkeypatch.setattr(engines_file, "_POWER_S", 1)
    line = "RAM 1/7MB CPU [5%@729] GR3D_FREQ 26% tj@46.4C VDD_IN 4900mW/5000mW"
    jetson.put("tegrastats", f'#!/bin/sh\nwhile :; do echo "{line}"; sleep 0.1; done\n')
    with device.engines() as engines:
        engine = engines.engine(onnx_file(tmp_path / "m.onnx"))
        power = engines.power(engine)
        assert power.watts == pytest.approx(4.9)
        (jetson.programs / "tegrastats").unlink()
        assert engines.power(engine) is None


@pytest.mark.parametrize(
    ("told", "raised", "said"),
    [
        ({"fail": "parse"}, BuildError, "checkUnique"),
        ({"fail": "memory"}, DeviceError, "memory ran out"),
        ({"fail": "crash"}, DeviceError, "exit code|signal"),
    ],
)
def test_a_build_that_fails_says_why_and_leaves_no_engine(device, jetson, tmp_path, told, raised, said):
    jetson.tell(**told)
    with device.engines() as engines:
        with pytest.raises(raised, match=said):
            engines.engine(onnx_file(tmp_path / "m.onnx"))
        jetson.tell(fail="")
        assert engines.engine(onnx_file(tmp_path / "m.onnx")).simulated  # the next build is a whole one


def test_a_trtexec_that_hangs_is_ended_on_the_board_at_its_deadline(device, jetson, tmp_path, monkeypatch):
    monkeypatch.setattr(engines_file, "_BUILD_S", 2.0)
    jetson.tell(hang=60)
    jetson.told["hang"] = 60
    with device.engines() as engines, pytest.raises(DeviceError, match="no end after 2 s"):
        engines.engine(onnx_file(tmp_path / "m.onnx"))


@pytest.mark.parametrize(("version", "said"), [("8602", "8.6.2.*too old"), ("none", "none at trtexec")])
def test_a_board_without_a_trtexec_of_today_is_told_so(device, jetson, version, said):
    if version == "none":
        (jetson.programs / "trtexec").unlink()
    else:
        jetson.tell(version=version)
    with pytest.raises(UnavailableError, match=said), device.engines():
        pass


def test_profile_measures_engines_and_their_layers(jetson, tmp_path, real):
    dense, small = onnx_file(tmp_path / "dense.onnx", channels=16), onnx_file(tmp_path / "small.onnx", quantized=True)
    jetson.tell(times_ms={digest(dense): 6.0, digest(small): 2.0})
    file = tmp_path / "nano.toml"
    file.write_text(BOARD.format(python=sys.executable))
    found = profiling.profile([dense, small], str(file), SETTINGS, Progress(io.StringIO()))
    assert [row.latency.p50_ms for row in found.rows] == [pytest.approx(6.0, rel=0.01), pytest.approx(2.0, rel=0.01)]
    assert [layer.ms for layer in found.rows[1].layers] == [0.0492, 0.03]
    assert found.kind is Kind.MEASURED
    assert "\n".join(profiling.table(found)).count("3.00x") == 1


def test_a_check_names_the_boards_tensorrt_and_takes_no_noise_floor_from_a_standin(jetson, tmp_path):
    file = tmp_path / "nano.toml"
    file.write_text(BOARD.format(python=sys.executable))
    lines, _ = board_check.check(boards.load(str(file)))
    assert any("tensorrt 10.3.0" in line for line in lines)
    (floor,) = (line for line in lines if line.startswith("noise floor"))
    assert "not measured" in floor
    assert "stamped simulated" in floor
    (jetson.programs / "trtexec").unlink()
    assert "none at trtexec" in board_check.check(boards.load(str(file)))[1][-1]


def test_facts_name_what_a_latency_depends_on(device):
    facts = device.facts("tensorrt", 1)
    assert facts["runtime_version"] == "tensorrt 10.3.0"
    assert facts["power_mode"] == "15W"


def test_the_agent_does_not_fall_asleep_while_an_engine_is_built(device, jetson, tmp_path, monkeypatch):
    monkeypatch.setattr(engines_file, "IDLE_S", 0.6)
    asked = []
    with device.engines() as engines:
        stream = engines.agent.stream
        ask = stream.ask
        monkeypatch.setattr(
            stream, "ask", lambda request, *rest, **more: (asked.append(request["op"]), ask(request, *rest, **more))[1]
        )
        jetson.tell(hang=1.5)
        engines.engine(onnx_file(tmp_path / "m.onnx"))
    assert asked.count("ping") >= 3


def test_the_loop_has_no_option_that_is_not_given_it_and_says_when_there_is_no_tensorrt(monkeypatch, capsys):
    given = {
        a.partition("=")[0]
        for command in (
            trtexec.build_command((), "m", "e", trtexec.Version(10, 3, 0), Precision.INT8, sparse=True, cache="c", layers="l"),
            trtexec.time_command((), "e", "t", 1),
        )
        for a in command
    }
    assert given <= set(tensorrt_loop.OPTIONS)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert tensorrt_loop.main(["--help"]) == tensorrt_loop.UNAVAILABLE
    assert "no TensorRT" in capsys.readouterr().out


def test_a_board_that_is_leased_is_nobody_elses_between_two_agents(device):
    with device.leased():
        for _ in range(2):
            with device.connect():
                pass
            with pytest.raises(BusyError):
                leases.lease(device.board)
    leases.lease(device.board).release()
