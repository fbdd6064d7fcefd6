"""This machine as a board: real models in real processes, ratios, refusals, deaths and deadlines."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_compress.devices.local import THIS_MACHINE, LocalDevice, describe
from edge_compress.devices.measure import meter as quick
from edge_compress.devices.measure.meter import QuickMeter
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.transport import base
from edge_compress.devices.transport.connection import LoadedModel
from edge_compress.pipeline.errors import BuildError, DeviceError, InputError, UnavailableError
from edge_compress.pipeline.types import Kind
from onnx import TensorProto, helper, numpy_helper

QUICK = TimingSettings(sessions=2, min_pairs=10, max_pairs=30, max_seconds=5.0, warmup_seconds=0.3)
ENDLESS = TimingSettings(sessions=1, min_pairs=10**8, max_pairs=10**9, max_seconds=120.0, warmup_seconds=0.1)


def save(path, nodes, weights, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def convolution(path, channels, *, batch: str | int = "n", height: str | int = 24):
    weight = np.random.default_rng(0).standard_normal((channels, 16, 3, 3)).astype(np.float32)
    return save(
        path,
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        [numpy_helper.from_array(weight, "w")],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 16, height, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "broken.onnx").write_bytes(b"this is no model")
    return {
        "small": convolution(folder / "small.onnx", 64),
        "big": convolution(folder / "big.onnx", 256),
        "tall": convolution(folder / "tall.onnx", 16, height="h"),
        "broken": folder / "broken.onnx",
    }


def test_smaller_model_is_measured_faster_than_one_four_times_its_size(models):
    steps = []
    result = LocalDevice().measure(
        models["big"], models["small"], replace(QUICK, sessions=5, max_pairs=20), lambda *step: steps.append(step)
    )
    assert 1.5 < result.speedup.median < 10.0
    assert result.speedup.ci95[0] > 1.0
    assert "inconclusive" not in result.quality
    assert result.dense.p50_ms > result.artifact.p50_ms > 0
    assert (result.device, result.kind, result.sessions) == ("local", Kind.MEASURED, 5)
    assert 50 <= result.pairs <= 100
    assert result.environment["cpu"]
    assert result.environment["runtime_version"][0].isdigit()
    assert steps == [(n, 6) for n in range(1, 7)]  # the control is a session too


def test_slower_candidate_is_below_one(models):
    (result,) = LocalDevice().sessions(models["small"], [models["big"]], TimingSettings(sessions=1, min_pairs=10, max_pairs=20))
    assert np.median(result.ratios()) < 0.7


def test_model_against_itself_is_about_one(models):
    result = LocalDevice(replace(THIS_MACHINE, name="bench")).measure(models["big"], models["big"], QUICK)
    assert result.device == "bench"
    assert 0.6 < result.speedup.median < 1.6
    assert result.speedup.ci95[0] < 1.15
    assert result.speedup.ci95[1] > 0.87
    assert result.noise_floor < 0.5


def test_session_keeps_raw_samples_of_equal_length(models):
    (result,) = LocalDevice().sessions(
        models["big"], [models["small"], models["big"]], TimingSettings(sessions=1, min_pairs=10, max_pairs=12)
    )
    everyone = (result.baseline, *result.candidates)
    assert len(everyone) == 3
    lengths = []
    for one in everyone:
        assert len(one.wall_ns) == len(one.cpu_ns)
        assert 10 <= len(one.wall_ns) <= 12
        assert (one.cpu_ns > 0).all()
        lengths.append(one.k * np.median(one.cpu_ns) / 1e6)  # without the waiting
    assert min(lengths) > 0.5
    assert max(lengths) < 3 * min(lengths)
    assert result.candidates[0].k > result.baseline.k
    assert result.peak_rss_bytes > 10**7
    assert result.stop in ("pairs", "converged")


def test_sampling_stops_when_the_interval_is_narrow_or_the_time_is_up(models):
    loose = TimingSettings(sessions=1, min_pairs=10, max_pairs=100_000, max_seconds=30, half_width=0.9, warmup_seconds=0.1)
    assert LocalDevice().sessions(models["small"], [models["small"]], loose)[0].stop == "converged"
    short = TimingSettings(sessions=1, min_pairs=10, max_pairs=100_000, max_seconds=0.05, half_width=1e-9, warmup_seconds=0.1)
    assert LocalDevice().sessions(models["small"], [], short)[0].stop == "time"


def test_integer_inputs_are_fed(tmp_path):
    for kind in (TensorProto.UINT8, TensorProto.INT8):
        path = save(
            tmp_path / f"{kind}.onnx",
            [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
            [],
            [helper.make_tensor_value_info("x", kind, ["n", 3, 64, 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        )
        (result,) = LocalDevice().sessions(path, [], TimingSettings(sessions=1, min_pairs=3, max_pairs=3))
        assert result.baseline.quiet_ms() > 0


@pytest.mark.parametrize("name", ["broken", "tall"])
def test_model_the_runtime_refuses_is_named(models, name):
    with pytest.raises(BuildError, match=rf"{name}\.onnx") as caught:
        LocalDevice().measure(models["small"], models[name], QUICK)
    assert "\n" not in str(caught.value)


def test_missing_file_unknown_runtime_and_absent_cpu_are_the_users_to_mend(models, tmp_path):
    with pytest.raises(InputError, match="gone"):
        LocalDevice().measure(models["small"], tmp_path / "gone.onnx", QUICK)
    with pytest.raises(UnavailableError, match=r"nothere.*onnxruntime"):
        LocalDevice().sessions(models["small"], [], TimingSettings(runtime="nothere"))
    with pytest.raises(InputError, match="affinity"):
        LocalDevice().sessions(models["small"], [], TimingSettings(affinity=(9999,)))


def test_process_is_pinned_where_it_was_told_to(models):
    cpu = min(os.sched_getaffinity(0))
    with LocalDevice().connect() as agent:
        assert os.sched_getaffinity(agent.load(models["small"], "onnxruntime", 1, (cpu,)).pid) == {cpu}


def test_machine_is_described_without_measuring():
    found = describe()
    assert found["cpu"]
    assert found["runtime_version"][0].isdigit()
    assert found["governor"]
    facts = LocalDevice().facts("onnxruntime", 1)
    assert {"cpu", "governor", "host", "runtime_version"} <= set(facts)
    assert facts["host"]  # two machines of one kind on one home folder do not share latencies
    assert "load_average" not in facts
    assert "affinity" not in facts


def test_latencies_of_one_core_are_not_those_of_another():
    assert LocalDevice(replace(THIS_MACHINE, affinity=(0, 1))).facts("onnxruntime", 1)["affinity"] == "0,1"


@pytest.fixture
def doomed(monkeypatch):
    """A model is killed some time after it is in place."""
    feed = LoadedModel.feed_random

    def arm(number: signal.Signals, name: str) -> None:
        def feed_and_die(model: LoadedModel, seed: int) -> None:
            feed(model, seed)
            if name in model.name:
                threading.Timer(0.7, os.kill, [model.pid, number]).start()

        monkeypatch.setattr(LoadedModel, "feed_random", feed_and_die)

    return arm


def test_process_killed_in_a_measurement_is_an_error_that_names_the_signal(models, doomed):
    doomed(signal.SIGSEGV, "small")
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"small\.onnx.*SIGSEGV"):
        LocalDevice().measure(models["big"], models["small"], ENDLESS)
    assert time.monotonic() - started < 30


def test_an_agent_that_hangs_is_killed_at_the_deadline(monkeypatch):
    monkeypatch.setattr(base, "LINK_SLACK_S", 0.5)
    with LocalDevice().connect() as agent:
        agent.stream.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(DeviceError, match="no answer after 2 s"):
            agent.ask({"op": "ping"}, 1.5, "doing nothing")
        assert time.monotonic() - started < 10
        assert agent.stream.process.returncode == -signal.SIGKILL


def test_interrupt_ends_the_agent(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with LocalDevice().connect() as agent:
        monkeypatch.setattr(agent.stream._channel, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            agent.hello()
        assert agent.stream.process.returncode is not None


def test_no_process_outlives_its_parent_in_the_middle_of_a_measurement(models):
    script = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "from edge_compress.devices.local import LocalDevice\n"
        "agent = LocalDevice().connect()\n"
        "model = agent.load(Path(sys.argv[1]), 'onnxruntime', 1)\n"
        "model.feed_random(0)\n"
        "print(agent.stream.process.pid, model.pid, flush=True)\n"
        "threading.Timer(1.0, os._exit, [0]).start()\n"
        "request = {'op': 'pairs', 'handles': [model.handle], 'k': [1], 'rounds': 10**9, 'seconds': 100.0, 'seed': 0}\n"
        "agent.ask(request, 100.0, 'x')\n"
    )
    command = [sys.executable, "-P", "-c", script, str(models["small"])]
    pids = list(map(int, subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.split()))
    assert len(pids) == 2
    deadline = time.monotonic() + 15
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, pids))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


LOUD = """
import os
import numpy
__version__ = "1.0"
class Value:
    name, type, shape = "x", "tensor(float)", ["n", 4]
class SessionOptions:
    def add_session_config_entry(self, *_): pass
def set_default_logger_severity(*_): pass
class InferenceSession:
    def __init__(self, *_, **__): os.write(1, b"noise {}\\n")
    def get_inputs(self): return [Value]
    def get_outputs(self): return [Value]
    def run(self, *_):
        os.write(1, b"noise {}\\n")
        return [numpy.zeros((1, 4), numpy.float32)]
"""


def test_prints_of_native_libraries_stay_out_of_the_answers(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text(LOUD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with LocalDevice().connect() as agent:
        model = agent.load(tmp_path / "onnxruntime.py", "onnxruntime", 1)
        assert model.version == "1.0"  # the loud one
        np.testing.assert_array_equal(model.run({"x": np.zeros((1, 4), np.float32)})["x"], np.zeros((1, 4)))


def test_a_module_of_the_current_folder_is_not_taken_for_pythons_own(models, tmp_path, monkeypatch):
    for name in ("json.py", "numpy.py", "board.py", "frames.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with LocalDevice().connect() as agent:
        assert agent.load(models["small"], "onnxruntime", 1).pid > 0


def test_the_process_that_is_timed_holds_nothing_heavy(models):
    with LocalDevice().connect() as agent:
        maps = Path(f"/proc/{agent.load(models['small'], 'onnxruntime', 1).pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert not any(name in maps for name in ("libtorch", "/scipy/", "matplotlib", "/onnx/"))


def meter_of(path: Path) -> QuickMeter:
    found = LocalDevice().meter(path.read_bytes(), "onnxruntime", 1, 0)
    assert isinstance(found, QuickMeter)
    return found


def test_quick_meter_tells_candidates_apart_and_outlives_those_that_fail(models):
    small, big = models["small"].read_bytes(), models["big"].read_bytes()
    with closing(meter_of(models["big"])) as meter:
        found = meter.ratio(small)
        assert found.value < 0.6
        assert 0 < found.half_width < 1
        assert 0.7 < meter.ratio(big).value < 1.4
        assert meter.dense_ms == meter.dense_ms > 0
        agent, baseline = meter._agent, meter._loaded
        assert agent is not None
        assert baseline is not None
        with pytest.raises(BuildError):
            meter.ratio(b"no model")
        with pytest.raises(BuildError, match="cannot be measured"):
            meter.ratio(models["tall"].read_bytes())
        assert meter.ratio(small).value > 0
        assert (meter._agent, meter._loaded) == (agent, baseline)  # a refused candidate costs no new process
        os.kill(baseline.pid, signal.SIGKILL)
        with pytest.raises(DeviceError, match="SIGKILL"):
            meter.ratio(small)
        assert meter.ratio(small).value < 0.6  # started again
        folder = Path(meter._agent.transport.folder)  # type: ignore[union-attr]
        assert folder.exists()
    assert agent.stream.process.returncode is not None
    assert not folder.exists()


def test_a_quick_measurement_ends_when_it_is_sure_and_at_the_latest_after_its_pairs(models, monkeypatch):
    counts = []
    with closing(meter_of(models["big"])) as meter:
        measure = meter._measure
        monkeypatch.setattr(meter, "_measure", lambda *a: counts.append(measure(*a)) or counts[-1])
        assert meter.dense_ms > 0
        counts.clear()
        for half_width, seconds in ((10.0, 1.0), (1e-9, 0.0), (1e-9, 1.0)):
            monkeypatch.setattr(quick, "QUICK_HALF_WIDTH", half_width)
            monkeypatch.setattr(quick, "QUICK_SECONDS", seconds)
            meter.ratio(models["big"].read_bytes())
    found = [(len(session.baseline.wall_ns), session.stop) for session in counts]
    assert found[:2] == [(12, "converged"), (24, "pairs")]
    assert 24 < found[2][0] <= 500  # more only as long as they take little time


def test_candidate_that_kills_its_process_is_named_by_signal_and_the_next_is_measured(models, doomed, monkeypatch):
    small = models["small"].read_bytes()
    with closing(meter_of(models["big"])) as meter:
        meter.ratio(small)
        doomed(signal.SIGILL, "candidate")
        with monkeypatch.context() as patch:
            patch.setattr(quick, "QUICK_SECONDS", 1e6)
            patch.setattr(quick, "QUICK_FEWEST", 10**6)
            with pytest.raises(DeviceError, match="SIGILL"):
                meter.ratio(small)
        monkeypatch.undo()
        assert meter.ratio(small).value < 0.6
