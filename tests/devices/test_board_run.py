"""A whole run that measures on a board: a small network over a real sshd, its agent killed in the middle."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import peers
import pytest

pytestmark = [pytest.mark.devices, pytest.mark.slow, pytest.mark.timeout(1500)]
COMMAND = str(Path(sys.executable).with_name("edge-compress"))
QUICK = ["--target", "x86", "--search", "knapsack", "--evaluations", "4", "--finetune-epochs", "1", "--max-accuracy-drop", "20"]


NETWORK = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)
    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.conv2(self.conv1(x).relu())).relu()
        return self.fc(x.mean((2, 3)))
def net():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture
def network(tmp_path) -> list[str]:
    """The options for a network with weights of its own: nothing is trained first."""
    import torch

    (tmp_path / "net.py").write_text(NETWORK)
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    torch.save(scope["net"]().state_dict(), tmp_path / "net.pt")  # type: ignore[operator]
    return ["--model", f"{tmp_path / 'net.py'}:net", "--weights", str(tmp_path / "net.pt"), "--data", "digits"]


@pytest.fixture
def board(server: peers.Sshd, tmp_path, monkeypatch) -> Path:
    """A board's file; ssh and scp on PATH know its host."""
    monkeypatch.setenv("PATH", str(server.programs()), prepend=":")
    path = tmp_path / "bench.toml"
    path.write_text(
        f'targets = ["x86"]\ntransport = "ssh"\naddress = "loop"\npython = "{server.python}"\nfolder = "{server.board_folder}"\n'
    )
    return path


def start(network: list[str], board: Path, out: Path) -> subprocess.Popen[str]:
    command = [COMMAND, *QUICK, *network, "--device", str(board), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_measures_on_the_board_survives_its_faults_and_compares_its_answers(server, board, network, tmp_path):
    out = tmp_path / "run"
    first = start(network, board, out)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(first.stderr or ()))
    reader.start()
    deadline = time.monotonic() + 900
    while not any(line.startswith("latency table") for line in lines) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while first.poll() is None and not server.model_pids():
        time.sleep(0.1)
    os.kill(server.agent_pid(), signal.SIGKILL)
    assert first.wait(300) == 4
    reader.join()
    assert first.stdout is not None
    assert first.stderr is not None
    first.stdout.close()
    first.stderr.close()
    assert lines[-1].startswith("edge-compress: board bench")
    assert re.search("ended|link went down", lines[-1])  # the one or the other, by what ssh noticed first
    known = list((tmp_path / "cache" / "latency").glob("*.jsonl"))

    again = start(network, board, out)
    printed, said = again.communicate(timeout=1200)
    assert again.returncode in (0, 1), said
    assert known
    report = json.loads((out / "report.json").read_text())
    target = report["targets"]["x86"]
    assert (target["latency"]["device"], target["latency"]["kind"]) == ("bench", "measured")
    assert target["latency"]["environment"]["boot_id"]
    assert report["pruned"]["search"]["latency_measured"] > 0
    seen = target["on_device"]
    assert (seen["device"], seen["kind"], seen["samples"]) == ("bench", "measured", 200)
    assert seen["agreement"] == 1.0  # the same runtime on the same machine
    assert seen["largest_difference"] == 0.0
    assert "Answers on bench" in (out / "report.md").read_text()
    context = json.loads(known[0].read_text().splitlines()[0])["context"]
    assert {"address", "runtime_version", "power_mode"} <= context.keys()

    other = start(network, board, tmp_path / "other")  # the table is the board's: another run reads it
    _, said = other.communicate(timeout=1200)
    assert other.returncode in (0, 1), said
    search = json.loads((tmp_path / "other" / "report.json").read_text())["pruned"]["search"]
    assert search["latency_reused"] > search["latency_measured"]
    assert printed.startswith("x86: ")
