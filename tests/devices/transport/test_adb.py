"""A real adbd in a network namespace: the agent over `adb shell`, exit codes, files, a cable that is pulled out."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import peers
import pytest
from edge_compress.devices.board import Board
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.devices.phone.device import PhoneDevice
from edge_compress.devices.remote import RemoteDevice
from edge_compress.devices.transport.adb import AdbTransport
from edge_compress.devices.transport.base import BusyError
from edge_compress.pipeline.errors import DeviceError
from edge_compress.pipeline.types import Kind
from faults import later, one_line
from link_cost import overhead_ms
from small_models import convolution

pytestmark = pytest.mark.devices
QUICK = TimingSettings(sessions=1, min_pairs=5, max_pairs=10, max_seconds=5.0, warmup_seconds=0.1)
MOST_MS = 2.0


@pytest.fixture(scope="module")
def phone(tmp_path_factory) -> Iterator[peers.Adbd]:
    """A server of adb's own port: a developer's on the usual one is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(peers.free_port()))
        with peers.adbd(tmp_path_factory.mktemp("adb")) as found:
            yield found


@pytest.fixture
def device(phone) -> Iterator[RemoteDevice]:
    board = Board("phone", ("x86",), "adb", address=phone.serial, python=sys.executable)
    found = RemoteDevice(board, AdbTransport("phone", phone.serial))
    yield found
    found.close()


def test_exit_codes_and_bytes_are_the_commands_own(device, tmp_path):
    done = device.transport.run(["sh", "-c", "printf 'a\\0b\\r\\n'; echo no >&2; exit 7"], 20)
    assert (done.code, done.stdout, done.stderr) == (7, b"a\0b\r\n", "no\n")
    source, back = tmp_path / "a file", tmp_path / "back"
    source.write_bytes(os.urandom(100_000))
    device.transport.push(source, "/data/local/tmp/there", 20)
    device.transport.pull("/data/local/tmp/there", back, 20)
    assert back.read_bytes() == source.read_bytes()


def test_measured_over_adb_the_smaller_model_is_faster(device, tmp_path):
    big, small = (convolution(tmp_path / f"{n}.onnx", n) for n in (256, 32))
    result = device.measure(big, small, replace(QUICK, max_pairs=20))
    assert result.speedup.median > 2.0
    assert (result.kind, result.device) == (Kind.MEASURED, "phone")


def test_a_phone_without_python_is_timed_by_its_own_program(device, phone, tmp_path):
    folder = device.transport.folder
    assert device.transport.run(["mkdir", "-p", folder], 20).code == 0
    program, body = (f"{folder}/{name}" for name in ("benchmark_model", "standin.py"))
    (tmp_path / "program").write_text(f'#!/bin/sh\nexec {sys.executable} {body} "$@"\n')
    device.transport.push(tmp_path / "program", program, 20)
    device.transport.push(Path(__file__).parents[2] / "support" / "benchmark_model_standin.py", body, 20)
    assert device.transport.run(["chmod", "+x", program], 20).code == 0
    for name, size in (("big", 400_000), ("small", 100_000)):
        (tmp_path / name).write_bytes(b"\x1c\0\0\0TFL3" + bytes(size))
    board = Board("pocket", ("phone",), "adb", "litert", address=phone.serial, benchmark_model="benchmark_model")
    settings = TimingSettings(runtime="litert", sessions=2, max_pairs=4, min_pairs=1, block=2)
    with contextlib.closing(PhoneDevice(board, AdbTransport("pocket", phone.serial))) as pocket:
        timing = pocket.measure(tmp_path / "big", tmp_path / "small", settings)
    assert timing.speedup.median > 2.0
    assert (timing.kind, timing.pairs) == (Kind.MEASURED, 8)


def test_a_large_file_is_sent_once(device, tmp_path):
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(50_000_000))
    seconds = []
    for expected in (True, False):
        with device.connect() as agent:
            started = time.monotonic()
            assert agent.put(large)[1] is expected
            seconds.append(time.monotonic() - started)
    print(f"50 MB: sent in {seconds[0]:.2f} s, known in {seconds[1]:.3f} s")


def test_a_request_costs_less_than_two_milliseconds(device):
    with device.connect() as agent:
        costs = [overhead_ms(agent, 50) for _ in range(20)]
    print(f"a request over adb costs {min(costs):.3f} ms, median {np.median(costs):.3f} ms")
    assert 0 < min(costs) < MOST_MS


def test_a_phone_that_is_not_there_is_said(phone):
    transport = AdbTransport("phone", "no-such-serial")
    with pytest.raises(DeviceError, match="no such device"):
        transport.run(["true"], 20)


@pytest.mark.slow
def test_the_cable_is_pulled_out_in_mid_request_and_the_deadline_holds(phone, device, tmp_path, monkeypatch):
    """adb itself would wait for ever."""
    monkeypatch.setattr("edge_compress.devices.transport.base.LINK_SLACK_S", 3.0)
    model = convolution(tmp_path / "m.onnx", 64)
    with device.connect() as agent:
        loaded = agent.load(model, "onnxruntime", 1)
        loaded.feed_random(0)
        request = {"op": "pairs", "handles": [loaded.handle], "k": [1], "rounds": 10**8, "seconds": 30.0, "seed": 0}
        with later(1.0, lambda: phone.island.cable("down")), one_line("no answer after", 30):
            agent.ask(request, 4.0, "measuring m.onnx")
    with one_line("no answer after|offline|no such device", 60):
        device.transport.run(["true"], 10)
    phone.island.cable("up")
    adb = peers.program("adb")
    for command in (["disconnect", phone.serial], ["connect", phone.serial]):
        peers.do(adb, *command)
    deadline = time.monotonic() + 60
    while _busy(device) and time.monotonic() < deadline:  # the agent of before sees its stdin close, or its watchdog ends it
        time.sleep(1)
    assert device.measure(model, model, QUICK).pairs >= 5


def _busy(device: RemoteDevice) -> bool:
    try:
        device.connect().close()
    except BusyError:
        return True
    return False


def test_python_is_this_machines_own(device):
    assert Path(sys.executable).exists()
    with device.connect() as agent:
        assert agent.hello()["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
