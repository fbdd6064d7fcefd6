"""What can go wrong on a board in the middle of a measurement: each ends in time, in one line, and the next one works.

The board is a real sshd in a network namespace of its own, with mounts of its own. Wrong host keys are in test_sshd.py,
answers and tensors that break off in test_remote.py.
"""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.transport import connection
from faults import later, one_line
from small_models import convolution, hungry

pytestmark = pytest.mark.devices
QUICK = TimingSettings(sessions=1, min_pairs=5, max_pairs=10, max_seconds=5.0, warmup_seconds=0.1)
ENDLESS = TimingSettings(sessions=1, min_pairs=10**8, max_pairs=10**9, max_seconds=120.0, warmup_seconds=0.1)
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def board(far):
    found = far[0].device()
    yield found
    found.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return convolution(tmp_path_factory.mktemp("models") / "m.onnx", 64)


def still_works(board, model: Path) -> None:
    assert board.measure(model, model, QUICK).pairs >= 5


@pytest.mark.slow  # keepalive takes its time
def test_the_link_goes_down_in_mid_measurement(far, board, model):
    server, place = far
    with board.connect() as agent:  # the agent and the model are there: what follows is the measurement itself
        agent.put(model)
    with later(4.0, lambda: place.cable("down")), one_line("link went down", 60):
        board.measure(model, model, ENDLESS)
    for pid in server.connections():  # they would find out after minutes
        os.kill(pid, signal.SIGKILL)
    with one_line("no route", 30):
        board.measure(model, model, QUICK)
    place.cable("up")
    still_works(board, model)


def test_the_agent_is_killed(far, board, model):
    with (
        later(3.0, lambda: os.kill(far[0].agent_pid(), signal.SIGKILL)),
        one_line("the agent on the board ended", 60),
    ):
        board.measure(model, model, ENDLESS)
    still_works(board, model)


def _kill_model(server, number: signal.Signals) -> None:
    deadline = time.monotonic() + 30
    while not (pids := server.model_pids()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(pids[0], number)


def test_the_model_is_killed_by_an_instruction_the_cpu_lacks(far, board, model):
    with (
        later(1.0, lambda: _kill_model(far[0], signal.SIGILL)),
        one_line(r"killed by SIGILL \(the runtime or the artifact needs an instruction this cpu lacks\)", 60),
    ):
        board.measure(model, model, ENDLESS)
    still_works(board, model)


def test_the_model_is_killed_for_its_memory(far, board, model, tmp_path):
    group = CGROUPS / "memory" / f"edge-compress-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(600 << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup of one's own: {error}")
    server = far[0]
    try:
        (group / "tasks").write_text(str(server.pid()))  # what it starts from now on is inside
        with one_line(r"killed by SIGKILL \(the kernel sends it when memory runs out\)|board has too little memory", 60):
            board.measure(model, hungry(tmp_path / "hungry.onnx", 1500), QUICK)
        still_works(board, model)
    finally:
        board.close()
        (CGROUPS / "memory" / "tasks").write_text(str(server.pid()))
        deadline = time.monotonic() + 20
        while (group / "tasks").read_text().strip() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


@pytest.mark.parametrize("size", ["20k", "1m"])
def test_the_boards_disk_is_full(far, board, model, tmp_path, size):
    """With less than the agent's own file takes, and with less than the model's."""
    server = far[0]
    large = tmp_path / "large.onnx"
    large.write_bytes(os.urandom(5_000_000))
    server.inside("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", server.board_folder)
    try:
        with one_line(r"disk is full|bytes free in .* needed", 60), board.connect() as agent:
            agent.put(large)
        board.close()
    finally:
        server.inside("umount", "-l", server.board_folder)
    again = server.device()
    still_works(again, model)
    again.close()


def test_somebody_else_measures_on_the_board(far, board, model, tmp_path, monkeypatch):
    with board.connect():
        other = far[0].device()
        with one_line("busy: another process of this machine", 5):
            other.connect()
        monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "another machine"))
        with one_line("busy: another process measures on it", 60):
            other.connect()
        other.close()
    monkeypatch.undo()
    still_works(board, model)


def test_the_board_is_rebooted_between_two_sessions(far, board, model, tmp_path):
    """Nothing but its boot id tells: the samples of before and after are not mixed."""
    server, fake = far[0], tmp_path / "boot_id"
    fake.write_text("00000000-aaaa-bbbb-cccc-000000000001\n")

    def reboot(done: int, _: int) -> None:
        if done == 1:
            server.inside("mount", "--bind", fake, "/proc/sys/kernel/random/boot_id")

    with one_line(r"rebooted while it was measured.*then 00000000-aaaa", 60):
        board.measure(model, model, replace(QUICK, sessions=3), reboot)
    try:
        still_works(board, model)
    finally:
        server.inside("umount", "-l", "/proc/sys/kernel/random/boot_id")


def test_the_board_is_rebooted_while_a_search_measures_on_it(far, board, model, tmp_path, monkeypatch):
    server, fake, data = far[0], tmp_path / "boot_id", model.read_bytes()
    fake.write_text("00000000-aaaa-bbbb-cccc-000000000002\n")
    with contextlib.closing(board.meter(data, "onnxruntime", 1, 0)) as meter:
        assert meter.ratio(data).value > 0
        monkeypatch.setattr("edge_compress.devices.measure.meter.IDLE_S", 0.0)  # its agent has ended itself
        server.inside("mount", "--bind", fake, "/proc/sys/kernel/random/boot_id")
        try:
            with one_line("rebooted during the search", 60):
                meter.ratio(data)
        finally:
            server.inside("umount", "-l", "/proc/sys/kernel/random/boot_id")
        assert meter.ratio(data).value > 0


# A runtime on a board that grows hot: every run of a model adds a byte to a file, and the longer the file the slower the clock.
CLOCKED = """
import math, os
import numpy
__version__ = "1.0"
class _Value:
    name, type, shape = "x", "tensor(float)", ["n", 16, 24, 24]
class SessionOptions:
    def add_session_config_entry(self, *_): pass
def set_default_logger_severity(*_): pass
class InferenceSession:
    def __init__(self, path, *_, **__):
        self.work = len(open(path, "rb").read()) // 40
    def get_inputs(self): return [_Value]
    def get_outputs(self): return [_Value]
    def run(self, *_):
        total, steps = 0, self.work
        if os.path.exists({heat!r}):
            steps = int(steps / max(0.15, math.exp(-os.path.getsize({heat!r}) / 100)))
            with open({heat!r}, "ab") as file: file.write(b".")
        for n in range(steps): total += n
        return [numpy.zeros((1, 1), numpy.float32)]
"""


def test_the_clock_is_throttled_in_mid_run(far, tmp_path):
    """The baseline is the thermometer: it drifts, the report says so, and the ratio stays what it is when cool."""
    heat, packages, wrapper = tmp_path / "heat", tmp_path / "packages", tmp_path / "python3"
    packages.mkdir()
    (packages / "onnxruntime.py").write_text(CLOCKED.format(heat=str(heat)))
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    slow, fast = (tmp_path / f"{name}.onnx" for name in ("slow", "fast"))
    slow.write_bytes(os.urandom(1_000_000))
    fast.write_bytes(os.urandom(500_000))
    board = far[0].device(python=str(wrapper))
    few = {"min_pairs": 120, "max_pairs": 120, "max_seconds": 60.0, "half_width": 1e-9, "min_sample_ms": 1e-3}
    settings = replace(QUICK, warmup_seconds=0.0, **few)
    heat.touch()
    throttled = board.measure(slow, fast, settings)
    board.close()
    assert "drift" in throttled.quality
    assert float(throttled.environment["baseline_drift"]) > 0.5
    assert throttled.speedup.median == pytest.approx(2.0, rel=0.2)  # as the work of the two is


def test_outputs_that_are_cut_short_are_no_outputs(far, model):
    """An agent that loses bytes on the way: the shapes tell."""
    data, _ = connection.packed_agent()
    whole, cut = b'b"".join(a.tobytes() for a in whole.values())', b'b"".join(a.tobytes()[4:] for a in whole.values())'
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert sum(content.count(whole) for content in files.values()) == 1
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.replace(whole, cut))
    changed = (buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest())
    board = far[0].device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "packed_agent", lambda: changed)
        with one_line(r"outputs of m\.onnx: found 147452 bytes, expected 147456 bytes", 60), board.connect() as agent:
            agent.load(model, "onnxruntime", 1).run({"x": np.zeros((1, 16, 24, 24), np.float32)})
    still_works(board, model)
    board.close()


def test_nothing_is_left_running_here(far, board, model):
    still_works(board, model)
    sockets = board.transport._sockets
    board.close()
    assert not sockets.exists()
    assert shutil.which("ssh")
