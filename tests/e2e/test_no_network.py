"""No command asks the network for anything, not even for a name: what a user compresses stays on his machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli_runs import Workshop, report_of

CALLS = "connect,sendto,sendmsg,sendmmsg"
ALONE = ("unshare", "--map-root-user", "--net")  # a network namespace of its own, without a network
PHONE = find_spec("ai_edge_litert") is not None and find_spec("litert_torch") is not None


def isolated() -> bool:
    tools = all(shutil.which(name) for name in ("strace", "unshare"))
    return tools and subprocess.run([*ALONE, "strace", "-qq", "-o", os.devnull, "true"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not isolated(), reason="no strace in a network namespace"),
]


def attempts(arguments: list[str], folder: Path, environment: dict[str, str] | None = None, code: int | None = 0) -> list[str]:
    """Calls of a Python process and its children that would have gone out; Unix sockets stay on the machine."""
    trace = folder / "trace"
    traced = ("strace", "-f", "-qq", "--seccomp-bpf", "-e", f"trace={CALLS}", "-o", str(trace))
    done = subprocess.run([*ALONE, *traced, sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert code is None or done.returncode == code, done.stderr
    return [line for line in trace.read_text(errors="replace").splitlines() if "AF_INET" in line]


def test_an_attempt_would_be_seen(tmp_path: Path) -> None:
    reaching = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.1', 53))"
    (line,) = attempts(["-c", reaching], tmp_path, code=1)
    assert "192.0.2.1" in line
    looking_up = "import socket\ntry: socket.getaddrinfo('example.org', 443)\nexcept OSError: pass"
    assert attempts(["-c", looking_up], tmp_path)


@pytest.mark.parametrize("target", ["x86", pytest.param("phone", marks=pytest.mark.skipif(not PHONE, reason="no phone extra"))])
def test_a_run_and_what_is_done_with_it_stay_on_the_machine(workshop: Workshop, tmp_path: Path, target: str) -> None:
    run, bundle = tmp_path / "run", tmp_path / "dist"
    tool = ["-m", "edge_compress"]
    # any exit code: on a busy machine so small a network may fail its speedup gate
    assert attempts([*tool, *workshop.arguments(run, target=target, min_speedup=0)], tmp_path, workshop.environment, None) == []
    (artifact,) = (run / "artifacts" / target).glob("model.*")
    commands = [["verify", str(run)], ["report", str(run)], ["profile", str(artifact)]]
    commands += [["inspect", "--model", "torchvision:mobilenet_v3_small"]]
    if report_of(run)["targets"][target]["verdict"]["passed"]:
        commands += [["release", str(run), "--out", str(bundle)]]
    for command in commands:
        assert attempts([*tool, *command], tmp_path, workshop.environment) == [], command
