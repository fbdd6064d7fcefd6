"""A real sshd on a high loopback port: keys, scp, the agent behind them. Skipped where no sshd can run."""

import contextlib
import os
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.errors import DeviceError
from edge_compress.pipeline.types import Kind
from link_cost import overhead_ms
from small_models import convolution

pytestmark = pytest.mark.devices
SETTINGS = TimingSettings(sessions=2, min_pairs=10, max_pairs=20, max_seconds=5.0, warmup_seconds=0.3)
MOST_MS = 1.0  # what a request may cost, over and above what it asks for


@pytest.fixture
def device(server):
    found = server.device()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("host", "meant"),
    [("stranger", "host key is not known"), ("changed", "host key has changed"), ("denied", "login was refused")],
)
def test_a_host_that_is_not_trusted_or_does_not_trust_is_told_apart(server, host, meant):
    device = server.device(host)
    started = time.monotonic()
    with pytest.raises(DeviceError, match=meant) as caught:
        device.connect()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30
    device.close()


def test_measured_over_ssh_the_smaller_model_is_faster(device, tmp_path):
    result = device.measure(convolution(tmp_path / "big.onnx", 256), convolution(tmp_path / "small.onnx", 32), SETTINGS)
    assert result.speedup.median > 2.0
    assert (result.kind, result.device) == (Kind.MEASURED, "loop")


def test_a_large_file_is_sent_once(device, tmp_path):
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(50_000_000))
    seconds = []
    for expected in (True, False):
        with device.connect() as agent:  # another agent each time: the file is known by its digest
            started = time.monotonic()
            assert agent.put(large)[1] is expected
            seconds.append(time.monotonic() - started)
    print(f"50 MB: sent in {seconds[0]:.2f} s, known in {seconds[1]:.3f} s")


def test_a_request_costs_less_than_a_millisecond(device):
    with device.connect() as agent:
        costs = [overhead_ms(agent, 50) for _ in range(20)]
    print(f"a request over ssh costs {min(costs):.3f} ms, median {np.median(costs):.3f} ms")
    assert 0 < min(costs) < MOST_MS  # the quietest of twenty moments: this machine may be busy


def test_a_meter_keeps_one_agent_and_leaves_no_candidates_behind(device, server, tmp_path):
    big, small = (convolution(tmp_path / f"{n}.onnx", n).read_bytes() for n in (250, 40))
    before = set(Path(server.board_folder).glob("*"))
    with contextlib.closing(device.meter(big, "onnxruntime", 1, 0)) as meter:
        assert meter.dense_ms > 0
        pid = server.agent_pid()
        assert meter.ratio(small).value < 0.6
        assert meter.ratios([small, big])[1].value == pytest.approx(1.0, abs=0.5)
        assert server.agent_pid() == pid
        new = {path.name for path in set(Path(server.board_folder).glob("*")) - before}
        assert {name for name in new if len(name) == 64} == {sha256(big).hexdigest()}  # of the candidates nothing is left


def test_facts_are_those_a_table_is_kept_by(device):
    import onnxruntime

    facts = device.facts("onnxruntime", 1)
    assert facts["runtime_version"] == f"onnxruntime {onnxruntime.__version__}"
    assert facts["address"] == "ssh loop"
    assert set(facts) == {"cpu", "board", "governor", "host", "address", "runtime_version", "power_mode"}
