"""A real sshd on a high loopback port: keys, keepalive, scp, the agent behind them. Skipped where no sshd can run."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from edge_compress.devices.agent_session import overhead_ms
from edge_compress.devices.boards import Board
from edge_compress.devices.remote import RemoteDevice
from edge_compress.devices.ssh import SshTransport
from edge_compress.devices.timing import TimingSettings
from edge_compress.pipeline.errors import DeviceError
from edge_compress.pipeline.types import Kind
from onnx import TensorProto, helper, numpy_helper

SETTINGS = TimingSettings(sessions=2, min_pairs=10, max_pairs=20, max_seconds=5.0, warmup_seconds=0.3)


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    config: Path  # the client's
    folder: str  # on the "board"

    def device(self, host: str = "loop") -> RemoteDevice:
        board = Board("loop", ("x86",), "ssh", address=host, python=sys.executable)
        return RemoteDevice(board, SshTransport("loop", host, self.folder, self.config))

    def connections(self) -> list[int]:
        """Processes of sshd that serve a connection."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, check=False)
        return [int(pid) for pid in found.stdout.split()]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    if sshd is None:
        pytest.skip("no sshd on this machine")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile {folder}/pid\nUsePAM no\nPasswordAuthentication no\nStrictModes no\nSubsystem sftp internal-sftp\n"
    )
    keys = {name: (folder / f"{name}.pub").read_text() for name in ("host", "other")}
    (folder / "known").write_text(f"[127.0.0.1]:{port} {keys['host']}")
    (folder / "changed").write_text(f"[127.0.0.1]:{port} {keys['other']}")
    hosts = {
        "loop": ("user", "known"),
        "stranger": ("user", "absent"),
        "changed": ("user", "changed"),
        "denied": ("other", "known"),
    }
    (folder / "client").write_text(
        "".join(
            f"Host {name}\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/{key}\n  IdentitiesOnly yes\n"
            f"  GlobalKnownHostsFile /dev/null\n  UserKnownHostsFile {folder}/{known}\n"
            for name, (key, known) in hosts.items()
        )
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    deadline = time.monotonic() + 10
    while "listening" not in (folder / "log").read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is not None:
        pytest.skip(f"sshd does not start: {(folder / 'log').read_text().strip()}")
    yield Server(process, folder / "client", str(folder / "board"))
    process.terminate()
    process.wait()


@pytest.fixture
def device(server):
    found = server.device()
    yield found
    found.close()


def convolution(path: Path, channels: int) -> Path:
    weight = np.random.default_rng(0).standard_normal((channels, 16, 3, 3)).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 24, 24])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("host", "meant"),
    [("stranger", "host key is not known"), ("changed", "host key has changed"), ("denied", "login was refused")],
)
def test_a_host_that_is_not_trusted_or_does_not_trust_is_told_apart(server, host, meant):
    device = server.device(host)
    with pytest.raises(DeviceError, match=meant):
        device.connect()
    device.close()


def test_measured_over_ssh_the_smaller_model_is_faster(device, tmp_path):
    result = device.measure(convolution(tmp_path / "big.onnx", 256), convolution(tmp_path / "small.onnx", 32), SETTINGS)
    assert result.speedup.median > 2.0
    assert (result.kind, result.device) == (Kind.MEASURED, "loop")


def test_a_large_file_is_sent_once_and_a_request_costs_little(device, tmp_path):
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(50_000_000))
    seconds = []
    with device.connect() as agent:
        for expected in (True, False):
            started = time.monotonic()
            assert agent.put(large)[1] is expected
            seconds.append(time.monotonic() - started)
        cost = overhead_ms(agent)
    print(f"50 MB: sent in {seconds[0]:.2f} s, known in {seconds[1]:.3f} s; a request costs {cost:.3f} ms")
    assert 0 < cost < 50  # this machine may be busy; on an idle one it is under 1


def test_a_link_that_dies_silently_in_mid_measurement_is_noticed_by_keepalive(device, server, tmp_path):
    model = convolution(tmp_path / "m.onnx", 64)
    endless = replace(SETTINGS, sessions=1, min_pairs=10**8, max_pairs=10**9, max_seconds=100.0)
    with device.connect() as agent:
        loaded = agent.load(model, "onnxruntime", 1)
        loaded.feed_random(0)
        stopped = server.connections()
        assert stopped
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        request = {"op": "pairs", "handles": [loaded.handle], "k": [1], "rounds": 10**8, "seconds": 90.0, "seed": 0}
        with pytest.raises(DeviceError, match="link went down"):
            agent.ask(request, endless.deadline_s(1), "measuring m.onnx")
        assert time.monotonic() - started < 40
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
    again = server.device()
    assert again.measure(model, model, replace(SETTINGS, sessions=1)).pairs >= 10
    again.close()
