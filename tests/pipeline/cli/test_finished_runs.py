"""`report`, `release` and `profile --out`: what they write is whole or not there, whatever the system refuses or kills."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.files import is_scratch
from edge_compress.pipeline.profile import profiling
from edge_compress.pipeline.profile.profiling import Profile, Row
from edge_compress.pipeline.types import Kind, Percentiles
from small_run import small_run

COMMANDS = {  # and what each of them writes
    "report run": ("run/report.md", "run/report.html"),
    "report run other --out place/page.html": ("place/page.html",),
    "release run --out place": ("place/*.tar.gz", "place/*.sha256"),
    "profile a.onnx --out place": ("place/profile.json", "place/profile.html"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(autouse=True)
def _two_runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with two runs whose pages are older than their reports; nothing is measured."""
    for name in ("run", "other"):
        shutil.copytree(made, tmp_path / name)
    for name in ("report.md", "report.html"):
        (tmp_path / "run" / name).write_text("old")
    monkeypatch.chdir(tmp_path)
    row = Row("a.onnx", Percentiles(1.0, 1.1, 1.2))
    monkeypatch.setattr(profiling, "profile", lambda *_: Profile("local", Kind.MEASURED, "onnxruntime", 1, (row,)))


def contents() -> dict[str, bytes]:
    """The files below the working folder, but for those that a killed process left unfinished."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file() and not is_scratch(path)}


def require_library(command: str) -> None:
    if command.startswith("release"):
        pytest.importorskip("cyclonedx", reason="the bill of materials needs the extra [release]")


def test_each_command_writes_what_these_tests_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    for command, written in COMMANDS.items():
        require_library(command)
        assert main(command.split()) == 0
        assert all(file.read_bytes() not in (b"", b"old") for name in written for file in Path().glob(name))
        assert all(list(Path().glob(name)) for name in written)
        shutil.rmtree("place", ignore_errors=True)


# --- refused ----------------------------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """The system refuses to open a new file, to write more than half of its content, or to make a folder."""
    opened, write, new = os.open, os.write, set()

    def error(path: object) -> OSError:
        return OSError(number, os.strerror(number), str(path))

    def refusing_open(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if not flags & os.O_CREAT or not is_scratch(Path(os.fsdecode(path))):
            return opened(path, flags, *more, **named)
        if call == "open":
            raise error(path)
        descriptor = opened(path, flags, *more, **named)
        new.add(descriptor)
        return descriptor

    def refusing_write(descriptor: int, data: Any) -> int:
        if descriptor not in new:
            return write(descriptor, data)
        if len(data) > 1:
            return write(descriptor, data[: len(data) // 2])
        raise OSError(number, os.strerror(number))

    def refusing_mkdir(path: Any, *_: Any, **__: Any) -> None:
        raise error(path)

    monkeypatch.setattr(os, "open", refusing_open)
    if call == "write":
        monkeypatch.setattr(os, "write", refusing_write)
    if call == "mkdir":
        monkeypatch.setattr(os, "mkdir", refusing_mkdir)


REFUSED = (("mkdir", "EROFS", 2), ("open", "EROFS", 2), ("write", "ENOSPC", 3), ("write", "EFBIG", 3))
ALSO = (("mkdir", "ENOSPC", 3), ("open", "EACCES", 2), ("open", "EDQUOT", 3), ("write", "EIO", 3))


@pytest.mark.parametrize(
    ("command", "call", "error", "code"),
    [
        *((command, *how) for command in COMMANDS for how in REFUSED if (command, how[0]) != ("report run", "mkdir")),
        *((command, *how) for command in COMMANDS if command.startswith("profile") for how in ALSO),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line_and_what_was_there_stays(
    command: str, call: str, error: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_library(command)
    number: int = getattr(errno, error)
    before = contents()
    with monkeypatch.context() as inside:
        refuse(inside, call, number)
        assert main(command.split()) == code
    err = capsys.readouterr().err
    assert err.startswith("edge-compress: ")
    assert err.count("\n") == 1
    assert ("the disk is full" if error in ("ENOSPC", "EDQUOT") and call != "mkdir" else os.strerror(number)) in err
    assert contents() == before
    assert not [path for path in Path().rglob("*") if is_scratch(path)]


def test_a_limit_to_the_size_of_files_ends_a_report_in_one_line() -> None:
    code = "import sys; from edge_compress.pipeline.cli.main import main; sys.exit(main(['report', 'run']))"
    limited = ["sh", "-c", 'ulimit -f 2 && exec "$0" "$@"', sys.executable, "-c", code]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (3, "")
    assert os.strerror(errno.EFBIG) in done.stderr
    assert done.stderr.count("\n") == 1
    assert Path("run/report.md").read_text() == "old"
    assert not [path for path in Path().rglob("*") if is_scratch(path)]


# --- killed -----------------------------------------------------------------------------------------------------------

KILLED = """
import itertools, os, signal, sys
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.release import release  # imported once, not in each child
from edge_compress.pipeline.report import pages, run_comparison

write, replace = os.write, os.replace

def call_killed(at):
    steps = itertools.count()
    def step():
        if next(steps) == at:
            os.kill(os.getpid(), signal.SIGKILL)
    def written(descriptor, data):
        done = write(descriptor, data[: len(data) // 2 + 1])
        step()
        return done + write(descriptor, data[done:])
    def replaced(source, target):
        step()
        replace(source, target)
        step()
    os.dup2(2, 1)
    os.write, os.replace = written, replaced
    os._exit(main(sys.argv[1:]))

for line in sys.stdin:
    child = os.fork() or call_killed(int(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Runs one command again and again, each time in a process that kills itself at a step of its writing."""

    def __init__(self, command: str) -> None:
        argv = [sys.executable, "-c", KILLED, *command.split()]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def ended(self, at: int) -> int:
        """The exit code of a process that is killed at a step, which it may not reach."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(at, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("command", "files"),
    [("report run", 2), ("report run other --out place/page.html", 1), ("release run --out place --sign key", 3)],
)
def test_killed_at_any_step_of_its_writing_the_same_command_gives_the_same_bytes(command: str, files: int) -> None:
    require_library(command)
    if "--sign" in command:
        minisign = pytest.importorskip("minisign", reason="signatures need the extra [release]")
        Path("key").write_bytes(bytes(minisign.KeyPair.generate().secret_key) + b"\n")
    before = contents()
    with closing(Killer(command)) as killer:
        assert killer.ended(-1) == 0
        wanted = contents()
        assert sum(before.get(name) != data for name, data in wanted.items()) == files
        for name in wanted:
            Path(name).write_bytes(before[name]) if name in before else Path(name).unlink()
        for at in range(3 * files):  # half written, written, renamed
            assert killer.ended(at) == -signal.SIGKILL
            assert all(data in (before.get(name), wanted[name]) for name, data in contents().items())
        assert killer.ended(3 * files) == 0
        assert contents() == wanted
