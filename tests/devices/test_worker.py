"""Real models in real processes: ratios, refusals, deaths and deadlines."""

import json
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
from edge_compress.devices import local
from edge_compress.devices.local import LocalDevice, QuickMeter, describe, sessions
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.worker_process import WorkerProcess, request_of
from edge_compress.pipeline.errors import BuildError, DeviceError, InputError
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
    (result,) = sessions(models["small"], [models["big"]], TimingSettings(sessions=1, min_pairs=10, max_pairs=20))
    assert np.median(result.ratios()) < 0.7


def test_model_against_itself_is_about_one(models):
    result = LocalDevice("bench").measure(models["big"], models["big"], QUICK)
    assert result.device == "bench"
    assert 0.6 < result.speedup.median < 1.6
    assert result.speedup.ci95[0] < 1.15
    assert result.speedup.ci95[1] > 0.87
    assert result.noise_floor < 0.5


def test_session_keeps_raw_samples_of_equal_length(models):
    (result,) = sessions(models["big"], [models["small"], models["big"]], TimingSettings(sessions=1, min_pairs=10, max_pairs=12))
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
    assert sessions(models["small"], [models["small"]], loose)[0].stop == "converged"
    short = TimingSettings(sessions=1, min_pairs=10, max_pairs=100_000, max_seconds=0.05, half_width=1e-9, warmup_seconds=0.1)
    assert sessions(models["small"], [], short)[0].stop == "time"


def test_integer_inputs_are_fed(tmp_path):
    for kind in (TensorProto.UINT8, TensorProto.INT8):
        path = save(
            tmp_path / f"{kind}.onnx",
            [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
            [],
            [helper.make_tensor_value_info("x", kind, ["n", 3, 64, 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        )
        (result,) = sessions(path, [], TimingSettings(sessions=1, min_pairs=3, max_pairs=3))
        assert result.baseline.quiet_ms() > 0


@pytest.mark.parametrize("name", ["broken", "tall"])
def test_model_the_runtime_refuses_is_named(models, name):
    with pytest.raises(BuildError, match=rf"{name}\.onnx") as caught:
        LocalDevice().measure(models["small"], models[name], QUICK)
    assert "\n" not in str(caught.value)


def test_missing_file_unknown_runtime_and_absent_cpu_are_the_users_to_mend(models, tmp_path):
    with pytest.raises(InputError, match="gone"):
        LocalDevice().measure(models["small"], tmp_path / "gone.onnx", QUICK)
    with pytest.raises(InputError, match=r"nothere.*onnxruntime"):
        sessions(models["small"], [], TimingSettings(runtime="nothere"))
    with pytest.raises(InputError, match="affinity"):
        sessions(models["small"], [], TimingSettings(affinity=(9999,)))


def test_process_is_pinned_where_it_was_told_to(models):
    cpu = min(os.sched_getaffinity(0))
    with closing(WorkerProcess()) as worker:
        settings = TimingSettings(affinity=(cpu,), min_pairs=3, max_pairs=3)
        worker.ask(request_of([models["small"]], settings, 0), 60, "small")
        assert os.sched_getaffinity(worker.process.pid) == {cpu}


def test_machine_is_described_without_measuring():
    found = describe()
    assert found["cpu"]
    assert found["runtime_version"]
    assert found["governor"]


def kill_later(process, number=signal.SIGKILL, after=1.0):
    timer = threading.Timer(after, process.send_signal, [number])
    timer.start()
    return timer


def test_worker_killed_in_a_measurement_is_an_error_that_names_the_signal(models, monkeypatch):
    class Doomed(WorkerProcess):
        def __init__(self):
            super().__init__()
            self.timer = kill_later(self.process, signal.SIGSEGV)

    monkeypatch.setattr(local, "WorkerProcess", Doomed)
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"small\.onnx.*SIGSEGV"):
        LocalDevice().measure(models["big"], models["small"], ENDLESS)
    assert time.monotonic() - started < 30


def test_worker_that_hangs_is_stopped_at_the_deadline(models):
    with closing(WorkerProcess()) as worker:
        kill_later(worker.process, signal.SIGSTOP, 0.5).join()
        started = time.monotonic()
        with pytest.raises(DeviceError, match="no answer after 1 s"):
            worker.ask(request_of([models["small"]], QUICK, 0), 1.0, "small")
        assert time.monotonic() - started < 10
        assert worker.process.returncode == -signal.SIGKILL


def test_interrupt_ends_the_worker(models, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    worker = WorkerProcess()
    monkeypatch.setattr(worker, "_exchange", interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.ask({}, 1.0, "x")
    assert worker.process.returncode is not None


def test_worker_does_not_outlive_its_parent(models):
    script = (
        "import json, os, sys, time\n"
        "from edge_compress.devices.local import WorkerProcess\n"
        "worker = WorkerProcess()\n"
        "os.write(worker.process.stdin.fileno(), sys.argv[1].encode() + b'\\n')\n"
        "print(worker.process.pid, flush=True)\n"
        "time.sleep(1.5)\n"
        "os._exit(0)\n"
    )
    request = json.dumps(request_of([models["small"]], ENDLESS, 0))
    done = subprocess.run([sys.executable, "-P", "-c", script, request], capture_output=True, timeout=60, check=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 15
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_prints_of_native_libraries_stay_out_of_the_answers():
    script = (
        "import os\n"
        "from edge_compress.devices import worker\n"
        "def loud(path, threads, seed):\n"
        "    return worker.Loaded(lambda: os.write(1, b'noise {}\\n'), '1')\n"
        "worker.RUNTIMES['loud'] = loud\n"
        "worker.main()\n"
    )
    request = request_of([Path("m")], TimingSettings(runtime="loud", min_pairs=2, max_pairs=2, warmup_seconds=0), 0)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], input=json.dumps(request).encode(), capture_output=True, timeout=60, check=True
    )
    assert json.loads(done.stdout)["ok"] is True
    assert b"noise {}" in done.stderr


def test_worker_imports_nothing_heavy():
    script = "import sys, edge_compress.devices.worker as w; w.RUNTIMES['onnxruntime']('', 1, 0); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = {m.split(".")[0] for m in done.stdout.split()}
    assert {"onnxruntime", "numpy"} <= loaded
    assert not loaded & {"torch", "onnx", "scipy", "matplotlib", "click"}


def test_quick_meter_tells_candidates_apart_and_outlives_those_that_fail(models):
    small, big = models["small"].read_bytes(), models["big"].read_bytes()
    with QuickMeter(big) as meter:
        assert meter.ratio(small, pairs=15) < 0.6
        assert 0.7 < meter.ratio(big, pairs=15) < 1.4
        assert meter.dense_ms == meter.dense_ms > 0
        worker = meter._worker
        with pytest.raises(BuildError):
            meter.ratio(b"no model")
        assert meter.ratio(small, pairs=5) > 0
        assert meter._worker is worker  # a refused candidate costs no new process
        assert worker is not None
        worker.process.kill()
        worker.process.wait()
        assert meter.ratio(small, pairs=15) < 0.6  # died between two candidates: started again
        assert meter._worker is not worker
        folder = meter._baseline.parent
    assert worker.process.returncode is not None
    assert not folder.exists()


def test_a_quick_measurement_ends_when_it_is_sure_and_at_the_latest_after_its_pairs(models, monkeypatch):
    big = models["big"].read_bytes()
    counts = []
    with QuickMeter(big) as meter:
        measure = meter._measure
        monkeypatch.setattr(meter, "_measure", lambda *a: counts.append(measure(*a)) or counts[-1])
        for half_width in (10.0, 1e-9):
            monkeypatch.setattr(local, "QUICK_HALF_WIDTH", half_width)
            meter.ratio(big)
    assert [(len(session.baseline.wall_ns), session.stop) for session in counts] == [(12, "converged"), (24, "pairs")]


def test_candidate_that_kills_the_worker_is_named_by_signal_and_the_next_is_measured(models):
    small, big = models["small"].read_bytes(), models["big"].read_bytes()
    with QuickMeter(big) as meter:
        meter.ratio(small, pairs=3)
        assert meter._worker is not None
        kill_later(meter._worker.process, signal.SIGILL, 0.7)
        with pytest.raises(DeviceError, match="SIGILL"):
            meter.ratio(small, pairs=10**6, fewest=10**6)
        assert meter.ratio(small, pairs=15) < 0.6
