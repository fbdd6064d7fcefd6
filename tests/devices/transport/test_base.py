"""Command lines that nothing can break out of, deadlines that hold, and messages that tell faults apart."""

import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from edge_compress.devices.board import Board
from edge_compress.devices.local import HereTransport
from edge_compress.devices.remote import RemoteDevice
from edge_compress.devices.transport import base
from edge_compress.devices.transport.adb import AdbTransport
from edge_compress.devices.transport.ssh import SshTransport
from edge_compress.pipeline.errors import DeviceError, UnavailableError

NASTY = ["printf", "%s|", "a b", "$HOME", "`id`", "'; touch broken; '", "-oProxyCommand=x", "*", "\n", ""]


@pytest.fixture(params=["ssh", "adb"])
def transport(request, standin):
    if request.param == "ssh":
        found = SshTransport("bench", "board", ".cache/edge-compress")
    else:
        found = AdbTransport("bench", "SERIAL", "edge-compress")
    yield found
    found.close()


def test_arguments_arrive_as_they_are(transport, standin):
    done = transport.run(NASTY, 20)
    assert done.stdout.decode() == "|".join(NASTY[2:]) + "|"
    assert not (standin.home / "broken").exists()


def test_exit_codes_and_stderr_are_the_commands_own(transport):
    done = transport.run(["sh", "-c", "echo out; echo err >&2; exit 7"], 20)
    assert (done.code, done.stdout, done.stderr) == (7, b"out\n", "err\n")


def test_files_are_copied_both_ways(transport, standin, tmp_path):
    source, back = tmp_path / "a file", tmp_path / "back"
    source.write_bytes(bytes(range(256)))
    transport.push(source, "there", 20)
    assert (standin.home / "there").read_bytes() == source.read_bytes()
    transport.pull("there", back, 20)
    assert back.read_bytes() == source.read_bytes()


def test_a_file_larger_than_it_can_be_is_not_taken_in(transport, standin, tmp_path):
    (standin.home / "large").write_bytes(bytes(5000))
    assert len(transport.read("large", 20, most=5000)) == 5000
    with pytest.raises(DeviceError, match=r"bench.*fetching large: found more than 4999 bytes") as raised:
        transport.read("large", 20, most=4999)
    assert "\n" not in str(raised.value)


def test_a_file_that_grows_while_it_is_fetched_is_given_up_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_LOOK_S", 0.05)
    transport = SshTransport("bench", "board")
    endless = "import sys, time\nwith open(sys.argv[1], 'wb', 0) as f:\n while True: f.write(bytes(1000)); time.sleep(0.01)"
    monkeypatch.setattr(transport, "pull_command", lambda remote, target: [sys.executable, "-c", endless, target])
    started = time.monotonic()
    with pytest.raises(DeviceError, match="more than 20000 bytes"):
        transport.pull("endless", tmp_path / "here", 60, most=20_000)
    assert time.monotonic() - started < 30
    transport.close()


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("pi@fe80::1", "pi@[fe80::1]:there"),
        ("fe80::1", "[fe80::1]:there"),
        ("pi@board", "pi@board:there"),
        ("board", "board:there"),
    ],
)
def test_scp_does_not_take_the_end_of_an_ipv6_address_for_a_path(address, where):
    transport = SshTransport("bench", address)
    assert transport.push_command("here", "there")[-1] == where
    assert transport.pull_command("there", "here")[-2] == where
    assert transport.command(["true"])[-2] == address
    transport.close()


def test_every_call_ends_at_its_deadline(transport, standin, tmp_path):
    transport.run(["true"], 20)  # adb has asked for features now
    standin.tell(hang=True)
    source = tmp_path / "a"
    source.write_bytes(b"")
    calls = [
        lambda: transport.run(["true"], 0.5),
        lambda: transport.push(source, "b", 0.5),
        lambda: transport.pull("b", tmp_path / "c", 0.5),
        lambda: transport.open(["true"], 0.5),
    ]
    for call in calls:
        started = time.monotonic()
        with pytest.raises(DeviceError, match=r"bench.*no answer after"):
            call()
        assert time.monotonic() - started < 10


def test_ssh_never_asks_and_always_checks_host_keys(standin):
    transport = SshTransport("bench", "board")
    transport.run(["true"], 20)
    (call,) = standin.calls("ssh")
    options = {value for flag, value in pairwise(call) if flag == "-o"}
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes", "ControlMaster=auto"} <= options
    assert {"ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"} <= options
    assert call[-3:-1] == ["--", "board"]
    transport.close()
    assert not transport._sockets.exists()


SSH = [
    ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "host key has changed"),
    ("No ED25519 host key is known for x and you have requested strict checking.\nHost key verification failed.", "not known"),
    ("pi@board: Permission denied (publickey).", "login was refused"),
    ("ssh: Could not resolve hostname board: Name or service not known", "no such host name"),
    ("ssh: connect to host board port 22: No route to host", "no route"),
    ("ssh: connect to host board port 22: Connection timed out", "no route"),
    ("ssh: connect to host board port 22: Connection refused", "nothing listens"),
    ("Timeout, server board not responding.", "link went down"),
]
ADB = [
    ("adb: device unauthorized.", "does not trust"),
    ("error: device offline", "offline"),
    ("adb: device 'SERIAL' not found", "no such device"),
    ("* cannot connect to daemon at tcp:5037: Connection refused", "server on this machine"),
]


@pytest.mark.parametrize(("kind", "code", "said", "meant"), [("ssh", 255, *c) for c in SSH] + [("adb", 1, *c) for c in ADB])
def test_each_fault_tells_itself_apart_in_one_line_with_what_to_do(standin, kind, code, said, meant):
    standin.tell(say=said, code=code)
    transport = SshTransport("bench", "board") if kind == "ssh" else AdbTransport("bench", "SERIAL")
    lines = set()
    for call in (transport.run, transport.open):
        with pytest.raises(DeviceError, match=meant) as caught:
            call(["true"], 20)
        assert "\n" not in str(caught.value)
        assert "expected" in str(caught.value)
        lines.add(str(caught.value).partition(";")[2])
    assert lines != {""}
    transport.close()


def test_a_board_without_python_says_so(standin):
    device = RemoteDevice(Board("bench", (), "ssh", address="board", python="no-such/python3"), SshTransport("bench", "board"))
    with pytest.raises(DeviceError, match=r"no python3 on the board.*3\.8.*install"):
        device.connect()
    device.close()


def test_a_full_disk_while_files_are_sent_is_said(standin, tmp_path):
    standin.tell(say="scp: write remote: No space left on device", code=1)
    source = tmp_path / "a"
    source.write_bytes(b"")
    with pytest.raises(DeviceError, match="disk is full"):
        SshTransport("bench", "board").push(source, "b", 20)


def test_a_folder_that_cannot_be_written_is_said(standin):
    device = RemoteDevice(Board("b", (), "ssh", python=sys.executable), SshTransport("b", "board", "/proc/edge-compress"))
    with pytest.raises(DeviceError, match="folder"):
        device.connect()


def test_adb_without_shell_v2_is_refused(standin):
    standin.tell(features="cmd\nstat_v2")
    with pytest.raises(DeviceError, match="shell_v2"):
        AdbTransport("bench", "SERIAL").run(["true"], 20)


def test_the_agent_answers_over_adb_too(standin):
    device = RemoteDevice(Board("bench", (), "adb", python=sys.executable), AdbTransport("bench", "SERIAL", "edge-compress"))
    with device.connect() as agent:
        assert agent.hello()["protocol"] == 1
    assert {call[2] for call in standin.calls("adb")} == {"SERIAL"}


def test_a_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="adb"):
        AdbTransport("bench", "SERIAL").run(["true"], 20)


def stream_of(program: str) -> base.Stream:
    """The stream of a program that poses as the agent, in bytes."""
    start = f"import sys, time\nsys.stdout.buffer.write({base.MAGIC!r}); sys.stdout.flush()\n"
    return base.Stream(SshTransport("bench", "board"), [sys.executable, "-c", start + program], 20)


def test_a_request_after_the_end_is_an_error_of_the_board():
    stream = stream_of("time.sleep(60)")
    stream.close()
    with pytest.raises(base.BoardError, match="closed"):
        stream.ask({"op": "ping"}, 1, "asking")


def test_messages_without_end_are_given_up_while_an_answer_is_waited_for(monkeypatch):
    monkeypatch.setattr(base, "MOST_OUTPUT", 100_000)
    stream = stream_of("while True: sys.stderr.write('x' * 1000); sys.stderr.flush(); time.sleep(0.001)")
    started = time.monotonic()
    with pytest.raises(base.BoardError, match="of messages"):
        stream.ask({"op": "ping"}, 60, "asking")
    assert time.monotonic() - started < 30
    assert stream.process.poll() is not None


def test_messages_without_end_are_given_up_while_the_agent_starts(monkeypatch):
    monkeypatch.setattr(base, "MOST_OUTPUT", 100_000)
    program = "import sys, time\nwhile True: sys.stderr.write('x' * 1000); sys.stderr.flush(); time.sleep(0.001)"
    started = time.monotonic()
    with pytest.raises(base.BoardError, match="of messages"):
        base.Stream(SshTransport("bench", "board"), [sys.executable, "-c", program], 60)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("to", ["stdout", "stderr"])
def test_a_command_that_writes_without_end_is_ended(to, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MOST_OUTPUT", 100_000)
    monkeypatch.setattr(base, "_LOOK_S", 0.05)
    program = f"import os, sys, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    program += f"while True: sys.{to}.write('x' * 1000); sys.{to}.flush(); time.sleep(0.001)"
    started = time.monotonic()
    with pytest.raises(base.BoardError, match=r"board here: running .*found more than 0 MiB of output"):
        HereTransport("here", str(tmp_path)).run([sys.executable, "-c", program], 60)
    assert time.monotonic() - started < 30
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_output_that_is_too_long_is_not_taken_into_memory_though_the_command_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MOST_OUTPUT", 100_000)
    monkeypatch.setattr(base, "Completed", lambda *_: pytest.fail("it was read"))
    with pytest.raises(base.BoardError, match="of output"):
        HereTransport("here", str(tmp_path)).run([sys.executable, "-c", "print('x' * 200_000)"], 60)


def test_of_long_messages_only_the_end_is_read_and_told(tmp_path, monkeypatch):
    seen = []
    transport = HereTransport("here", str(tmp_path))
    monkeypatch.setattr(transport, "explain", lambda message: seen.append(message))
    start = f"import sys; sys.stdout.buffer.write({base.MAGIC!r}); sys.stdout.flush(); sys.stdin.buffer.read(4)\n"
    program = start + "sys.stderr.write('No space left on device\\n' * 400_000 + 'last words'); sys.exit(3)"
    stream = base.Stream(transport, [sys.executable, "-c", program], 20)
    with pytest.raises(base.AgentEnded, match=r"ended with exit code 3 \(last words\)"):
        stream.ask({"op": "ping"}, 20, "asking")
    assert [len(message) for message in seen] == [4000]
