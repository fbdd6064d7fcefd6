"""A stand-in for ssh, scp and adb that runs the command on this machine and misbehaves as it is told.

It is no board: what is measured through it says something of the transport and the agent, nothing of any device.
"""

import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest
from edge_compress.devices.tensorrt import trtexec
from jetsons import Jetson

STANDIN = """#!{python}
import json, os, shutil, signal, subprocess, sys, threading, time
home, name, args = {home!r}, os.path.basename(sys.argv[0]), sys.argv[1:]
told = json.load(open(os.path.join(home, "told.json")))
with open(os.path.join(home, "calls.jsonl"), "a") as log:
    log.write(json.dumps([name, *args]) + "\\n")
if "hang" in told: time.sleep(600)
if "say" in told:
    sys.stderr.write(told["say"] + "\\n"); sys.exit(told["code"])
if name == "scp" or (name == "adb" and args[2] in ("push", "pull")):
    source, target = (part.rpartition(":")[2] for part in args[-2:])
    os.chdir(home)
    shutil.copy(source, target); sys.exit(0)
if name == "ssh" and "-O" in args: sys.exit(0)
if name == "adb" and args[2] == "features":
    print(told.get("features", "cmd\\nshell_v2")); sys.exit(0)
if name == "ssh": assert args[-3] == "--", args
child = subprocess.Popen(["sh", "-c", told.get("prefix", "") + args[-1]], cwd=home, stdout=subprocess.PIPE,
                         env=dict(os.environ, PATH=told.get("path", os.environ["PATH"])))
def down():
    sys.stderr.write("Timeout, server board not responding.\\n"); sys.stderr.flush()
    child.kill(); os._exit(255)
if "down_after_s" in told: threading.Timer(told["down_after_s"], down).start()
left = told.get("cut_after_bytes", 1 << 40)
while True:
    data = os.read(child.stdout.fileno(), 65536)
    if not data: break
    data = data[:left]; left -= len(data)
    os.write(1, data)
    if not left: child.kill(); os._exit(0)
code = child.wait()
os._exit(255 if code < 0 else code)
"""


class StandIn:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.tell()

    def tell(self, **how: object) -> None:
        (self.home / "told.json").write_text(json.dumps(how))

    def calls(self, program: str) -> list[list[str]]:
        log = self.home / "calls.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [call for call in map(json.loads, lines) if call[0] == program]


@pytest.fixture
def standin(tmp_path, monkeypatch) -> StandIn:
    home, programs = tmp_path / "board", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    for name in ("ssh", "scp", "adb"):
        file = programs / name
        file.write_text(STANDIN.format(python=sys.executable, home=str(home)))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return StandIn(home)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Locks and failures of boards are this test's own."""
    monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def jetson(standin, tmp_path):
    return Jetson(standin, tmp_path)


@pytest.fixture
def real(monkeypatch):
    """The stamp does not count: only to see what would be done with a real engine."""
    monkeypatch.setattr(trtexec, "SIMULATED", b"another stamp")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[peers.Sshd]:
    """A real sshd on a loopback port."""
    with peers.loopback(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture(scope="module")
def far(tmp_path_factory) -> Iterator[tuple[peers.Sshd, peers.Island]]:
    """A real sshd in a network namespace, with mounts of its own."""
    with peers.island_sshd(tmp_path_factory.mktemp("far")) as found:
        yield found
