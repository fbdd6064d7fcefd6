"""The agent behind a stand-in for ssh, with ONNX Runtime in real processes: figures, refusals, deaths, broken links."""

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from edge_compress.devices.agent import tensors
from edge_compress.devices.agent.board import digest_of
from edge_compress.devices.board import Board
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.devices.measure.referenced import ReferencedMeter
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.opening import open_board
from edge_compress.devices.remote import RemoteDevice
from edge_compress.devices.transport.ssh import SshTransport
from edge_compress.pipeline.errors import BuildError, DeviceError, InputError, UnavailableError
from edge_compress.pipeline.types import Kind
from link_cost import overhead_ms
from onnx import TensorProto, helper, numpy_helper

QUICK = TimingSettings(sessions=2, min_pairs=10, max_pairs=20, max_seconds=5.0, warmup_seconds=0.3)
ENDLESS = TimingSettings(sessions=1, min_pairs=10**8, max_pairs=10**9, max_seconds=60.0, warmup_seconds=0.1)
BOARD = Board("bench", ("x86",), "ssh", address="board", python=sys.executable)


def convolution(path: Path, channels: int) -> Path:
    weight = np.random.default_rng(0).standard_normal((channels, 16, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 24, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "broken.onnx").write_bytes(b"this is no model")
    made = {name: convolution(folder / f"{name}.onnx", channels) for name, channels in (("small", 32), ("big", 256))}
    return made | {"broken": folder / "broken.onnx"}


@pytest.fixture
def device(standin):
    found = RemoteDevice(BOARD, SshTransport("bench", "board"))
    yield found
    found.close()


def test_measured_through_the_agent_the_smaller_model_is_faster(device, models):
    steps = []
    result = device.measure(models["big"], models["small"], QUICK, lambda *step: steps.append(step))
    assert 2.0 < result.speedup.median < 20.0
    assert (result.device, result.kind, result.sessions) == ("bench", Kind.MEASURED, 2)
    assert 20 <= result.pairs <= 40
    assert result.noise_floor < 0.5
    assert result.environment["runtime_version"] == onnxruntime.__version__
    assert int(result.environment["peak_rss_bytes"]) > 10**7
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_sessions_are_added_while_the_ratio_is_uncertain_and_no_longer(device, models, monkeypatch):
    monkeypatch.setattr("edge_compress.devices.remote.uncertain", lambda sessions, _: len(sessions) < 4)
    steps = []
    how = replace(QUICK, most_sessions=9)
    result = device.measure(models["big"], models["small"], how, lambda *step: steps.append(step))
    assert result.sessions == 4
    assert steps == [(1, 3), (2, 4), (3, 5), (4, 5), (5, 5)]
    monkeypatch.setattr("edge_compress.devices.remote.uncertain", lambda *_: True)
    assert len(device.sessions(models["big"], [models["small"]], replace(QUICK, most_sessions=3))) == 3
    assert len(device.sessions(models["big"], [models["small"]], QUICK)) == 2


def test_a_search_on_a_board_lent_to_one_at_a_time_measures_the_reference_and_the_candidates(device, models, tmp_path):
    """Each meter has the board to itself; a budget in milliseconds is asked for in between."""
    big, small = (models[name].read_bytes() for name in ("big", "small"))
    cache = LatencyCache({"device": "bench"}, tmp_path)
    meter = ReferencedMeter(lambda file: device.meter(file, "onnxruntime", 1, 0), big, lambda: big, cache)
    with contextlib.closing(meter):
        found = meter.ratio(small).value
        assert meter.dense_ms > 0
        assert meter.ratio(small).value == pytest.approx(found, rel=0.5)
    assert found < 0.6


def test_an_emulated_board_never_gives_a_measured_latency(standin, models):
    device = RemoteDevice(replace(BOARD, emulated=True), SshTransport("bench", "board"))
    assert device.measure(models["big"], models["small"], replace(QUICK, sessions=1)).kind is Kind.EMULATED
    with pytest.raises(UnavailableError, match="emulated"):
        device.sessions(models["big"], [], QUICK)
    standin.tell(prefix="QEMU_CPU=cortex-a76 ")
    told_by_itself = RemoteDevice(BOARD, SshTransport("bench", "board"))
    assert told_by_itself.measure(models["big"], models["small"], replace(QUICK, sessions=1)).kind is Kind.EMULATED


def test_outputs_are_those_of_the_runtime_here_and_files_are_sent_once(device, standin, models):
    image = np.random.default_rng(1).standard_normal((2, 16, 24, 24)).astype(np.float32)
    expected = onnxruntime.InferenceSession(models["small"]).run(None, {"x": image})[0]
    with device.connect() as agent:
        assert agent.put(models["small"]) == (digest_of(models["small"]), True)
        model = agent.load(models["small"], "onnxruntime", 1)
        np.testing.assert_array_equal(model.run({"x": image})["y"], expected)
        model.unload()
        with pytest.raises(InputError, match="no such model"):
            model.run({"x": image})
    with device.connect() as agent:
        digest, sent = agent.put(models["small"])
        assert not sent
        stored = standin.home / ".cache/edge-compress" / digest
        assert stored.read_bytes() == models["small"].read_bytes()
    stored.write_bytes(b"damaged on the board")
    with device.connect() as agent:
        assert agent.put(models["small"])[1]  # what is damaged there is sent again
    assert len(standin.calls("scp")) == 1


@pytest.mark.parametrize("damage", [lambda data: data + b"\n# changed\n", lambda data: data[:5000], lambda data: b""])
def test_a_damaged_agent_is_replaced(device, standin, damage):
    with device.connect():
        pass
    (file,) = (standin.home / ".cache/edge-compress").glob("agent-*.pyz")
    file.write_bytes(damage(file.read_bytes()))
    with device.connect():
        pass
    assert len(standin.calls("scp")) == 2


def test_board_describes_itself(device):
    with device.connect() as agent:
        found = agent.hello()
        cost = overhead_ms(agent)
    assert found["runtimes"]["onnxruntime"] == onnxruntime.__version__
    assert found["memory_total_bytes"] > found["memory_available_bytes"] > 0
    assert found["disk_free_bytes"] > 0
    assert found["machine"]["python"][:2] == "3."
    print(f"agent overhead {cost:.3f} ms a request")
    assert 0 < cost < 50  # this machine may be busy; on an idle one it is under 1


def test_a_model_the_runtime_refuses_is_named_and_the_next_one_loads(device, models):
    with device.connect() as agent:
        with pytest.raises(BuildError, match=r"broken\.onnx"):
            agent.load(models["broken"], "onnxruntime", 1)
        with pytest.raises(UnavailableError, match="tensorrt"):
            agent.load(models["small"], "tensorrt", 1)
        with pytest.raises(InputError, match="affinity"):
            agent.load(models["small"], "onnxruntime", 1, (9999,))
        assert agent.load(models["small"], "onnxruntime", 1).inputs[0]["name"] == "x"


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGKILL])
def test_a_model_killed_by_a_signal_is_an_answer_and_the_agent_lives_on(device, models, number):
    with device.connect() as agent:
        model = agent.load(models["small"], "onnxruntime", 1)
        model.feed_random(0)
        threading.Timer(0.5, os.kill, [model.pid, number]).start()
        request = {"op": "pairs", "handles": [model.handle], "k": [1], "rounds": 10**9, "seconds": 30.0, "seed": 0}
        with pytest.raises(DeviceError, match=number.name):
            agent.ask(request, 30.0, "measuring small.onnx")
        assert agent.load(models["small"], "onnxruntime", 1).handle != model.handle


def test_a_model_that_hangs_is_ended_at_the_deadline(device, models):
    with device.connect() as agent:
        model = agent.load(models["small"], "onnxruntime", 1)
        os.kill(model.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(DeviceError, match="did not answer in time"):
            model.run({"x": np.zeros((1, 16, 24, 24), np.float32)}, deadline_s=0.5)
        assert time.monotonic() - started < 10
        assert agent.hello()["protocol"] == 1


def agent_pid(standin) -> int:
    lock = standin.home / ".cache/edge-compress/lock"
    deadline = time.monotonic() + 30
    while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(lock.read_text())


def test_agent_killed_in_mid_measurement_is_one_line_and_the_next_measurement_works(device, standin, models):
    def kill_at_work() -> None:
        pid = agent_pid(standin)
        while not Path(f"/proc/{pid}/task/{pid}/children").read_text():  # its models' processes
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill_at_work).start()
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"bench.*onnx.*ended") as caught:
        device.measure(models["big"], models["small"], ENDLESS)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 60
    assert device.measure(models["big"], models["small"], replace(QUICK, sessions=1)).pairs >= 10


def test_link_down_in_mid_measurement_says_so_and_leaves_no_agent(device, standin, models):
    with device.connect():
        pass
    standin.tell(down_after_s=3.0)
    with pytest.raises(DeviceError, match="link went down"):
        device.measure(models["big"], models["small"], ENDLESS)
    gone = agent_pid(standin)
    deadline = time.monotonic() + 10
    while _runs(gone) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(gone)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_answer_that_breaks_off_is_noticed(device, standin, models):
    with device.connect() as agent:
        agent.put(models["small"])
    standin.tell(cut_after_bytes=2000)
    with device.connect() as agent:
        model = agent.load(models["small"], "onnxruntime", 1)
        with pytest.raises(DeviceError, match="broke off: in the middle of a frame"):
            model.run({"x": np.zeros((1, 16, 24, 24), np.float32)})


def test_tensors_shorter_than_their_shape_are_refused_on_both_sides(device, models):
    with pytest.raises(tensors.SizeError, match="12 bytes, 16 expected"):
        tensors.unpacked([{"name": "y", "dtype": "float32", "shape": [1, 4]}], b"\0" * 12)
    with device.connect() as agent:
        model = agent.load(models["small"], "onnxruntime", 1)
        heads = [{"name": "x", "dtype": "float32", "shape": [1, 16, 24, 24]}]
        with pytest.raises(InputError, match="36864 bytes, 100 came"):
            agent.ask({"op": "run", "handle": model.handle, "tensors": heads}, 10.0, "running", b"\0" * 100)


def test_a_second_agent_on_the_board_is_told_it_is_busy(device):
    with device.connect():
        other = RemoteDevice(BOARD, SshTransport("bench", "board"))
        with pytest.raises(DeviceError, match="busy"):
            other.connect()


def test_the_agent_ends_itself_when_nothing_is_asked_of_it(device, monkeypatch):
    monkeypatch.setattr("edge_compress.devices.transport.connection.IDLE_S", 1)
    with device.connect() as agent:
        agent.stream.process.wait(20)
        assert agent.stream.process.returncode == 0


def test_power_mode_that_is_not_the_board_files_is_refused(standin, models):
    tool = standin.home / "nvpmodel"
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: 15W'\necho 2\n")
    tool.chmod(0o755)
    standin.tell(path=f"{standin.home}:{os.environ['PATH']}")
    with pytest.raises(DeviceError, match="found 15W, expected MAXN"):
        RemoteDevice(replace(BOARD, power_mode="MAXN"), SshTransport("bench", "board")).measure(
            models["big"], models["small"], QUICK
        )
    right = RemoteDevice(replace(BOARD, power_mode="15W"), SshTransport("bench", "board"))
    timing = right.measure(models["big"], models["small"], replace(QUICK, sessions=1))
    assert timing.environment["power_mode"] == "15W"


def test_what_a_login_shell_prints_is_skipped(device, standin):
    standin.tell(prefix="echo Welcome to the board; ")
    with device.connect() as agent:
        assert agent.hello()["protocol"] == 1


def test_a_full_disk_is_said(device, models, monkeypatch):
    with device.connect() as agent:
        request = {"op": "put", "sha256": "0" * 64, "size": 1 << 60, "offset": 0}
        with pytest.raises(DeviceError, match=r"bytes free.*expected space"):
            agent.ask(request, 10.0, "sending huge.onnx", b"x")
        wrong = {"op": "put", "sha256": "0" * 64, "size": 1, "offset": 0}
        with pytest.raises(InputError, match="another digest"):
            agent.ask(wrong, 10.0, "sending", b"x")


def test_a_template_has_no_address_and_says_what_to_do():
    with pytest.raises(InputError, match="address"):
        open_board(replace(BOARD, address=""))
    for transport in ("ssh", "adb"):
        open_board(replace(BOARD, transport=transport)).close()


def test_models_that_are_timed_together_share_a_process_and_others_do_not(device, models):
    """On CPUs of their own, what slows one of these down would be taken for a property of the model."""
    with device.connect() as agent:
        one = agent.load(models["big"], "onnxruntime", 1)
        beside = agent.load(models["small"], "onnxruntime", 1, None, one)
        apart = agent.load(models["small"], "onnxruntime", 1)
        assert one.pid == beside.pid != apart.pid
        with pytest.raises(InputError, match="beside"):
            agent.ask({"op": "warm", "handles": [one.handle, apart.handle]}, 10.0, "measuring")
        one.unload()
        assert _runs(beside.pid)  # until the last of them is gone
        beside.unload()
        assert not _runs(one.pid)


def test_a_board_that_one_thread_has_to_itself_is_busy_for_another(device):
    found: list[object] = []

    def other() -> None:
        try:
            with device.connect():
                found.append("connected")
        except DeviceError as error:
            found.append(error)

    with device.leased():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with device.connect():  # its own
            pass
    assert "busy" in str(found[0])
