"""How a call ends: what the system refuses is one line and a documented exit code, whatever became of the streams."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from edge_compress.pipeline.cli.exit_codes import exit_code_of
from edge_compress.pipeline.errors import printable

START = "import sys; from edge_compress.pipeline.cli.exit_codes import exit_code_of; import click, os, time\n"


def run(body: str, **more: object) -> subprocess.CompletedProcess[str]:
    """A process whose call has a body."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    code = f"{START}def call():\n{indented}\n    return 0\nsys.exit(exit_code_of(call))"
    return subprocess.run([sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, check=False, timeout=60, **more)


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("open('/nowhere/at/all')", 2, "/nowhere/at/all: No such file or directory"),
        ("open('.')", 2, ".: Is a directory"),
        ("open('x' * 300, 'w')", 2, "File name too long"),
        ("open(b'gone-\\xff')", 2, "gone-\\udcff: No such file"),
        ("raise OSError(5, 'Input/output error')", 3, "Input/output error"),
        ("raise MemoryError", 3, "memory"),
        ("raise ImportError('libx.so: failed to map segment')", 3, "a package cannot be loaded: libx.so: failed to map"),
        ("raise click.Abort", 130, "interrupted"),
        ("raise click.ClickException('\\x1b[2Jno')", 1, "\\x1b[2Jno"),
    ],
)
def test_what_the_system_refuses_is_one_line(body: str, code: int, told: str, tmp_path: Path) -> None:
    done = run(body, stdout=subprocess.DEVNULL, cwd=tmp_path)
    assert done.returncode == code
    assert told in done.stderr
    assert done.stderr.startswith("edge-compress: ")
    assert done.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 // 0)


def test_a_full_disk_behind_stdout_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        done = run("click.echo('result')", stdout=full)
    assert (done.returncode, done.stderr) == (3, "edge-compress: the output could not be written: No space left on device\n")


def test_a_reader_that_has_gone_is_told_once() -> None:
    source, sink = os.pipe()
    os.close(source)
    done = run("click.echo('x' * 100_000)", stdout=sink)
    os.close(sink)
    assert (done.returncode, done.stderr) == (3, "edge-compress: the output could not be written: Broken pipe\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_change_nothing(closed: str, tmp_path: Path) -> None:
    body = "    click.echo('a')\n    click.echo('b', err=True)\n    open('kept', 'w').write('own')\n    return 0\n"
    code = f"{START}def call():\n{body}"
    script = tmp_path / "script.py"
    script.write_text(code + "sys.exit(exit_code_of(call))")
    done = subprocess.run(["sh", "-c", f"{sys.executable} {script} {closed}"], check=False, cwd=tmp_path, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "kept").read_text() == "own"  # a file that is opened later does not take a stream's place


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_more_signals_do_not_break_off_the_cleaning_up(number: int, tmp_path: Path) -> None:
    body = (
        "try:\n    print('up', flush=True)\n    time.sleep(30)\nfinally:\n"
        "    print('cleaning', flush=True)\n    time.sleep(1)\n    open('cleaned', 'w').close()"
    )
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    reset = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # these tests may run under nohup
    code = f"{START}{reset}def call():\n{indented}\n    return 0\nsys.exit(exit_code_of(call))"
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "up\n"
    running.send_signal(number)
    assert running.stdout.readline() == "cleaning\n"
    running.send_signal(number)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "edge-compress: interrupted; run the same command again to resume\n")
    assert (tmp_path / "cleaned").exists()


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    body = "os.kill(os.getpid(), 1)\ntime.sleep(0.2)\nprint('on')"
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    (tmp_path / "script.py").write_text(f"{START}def call():\n{indented}\n    return 0\nsys.exit(exit_code_of(call))")
    command = ["nohup", sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_control_characters_and_bytes_that_are_no_text_are_shown_escaped() -> None:
    assert printable("a\x1b[31m\udcffé\n") == "a\\x1b[31m\\udcffé\n"
    assert click.unstyle(printable("\x1b[1mx")) == "\\x1b[1mx"
