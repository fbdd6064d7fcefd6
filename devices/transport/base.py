"""How a board is reached: run a command there, copy files, hold a framed stream open. Every call has a deadline.

What differs between ssh and adb is how a command line is made and what their messages mean; the rest is here.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from ...pipeline.errors import DeviceError, UnavailableError
from ..agent.frames import MAGIC, MOST_PAYLOAD, Channel, Gone, Late

Taken = TypeVar("Taken")
MOST_OUTPUT = 64 << 20  # bytes that a program on the board, or its link, may write
MOST_FILE, MOST_READ = 4 << 30, 1 << 30  # bytes of a file that is fetched, and of one that is taken into memory


@dataclass(frozen=True)
class Completed:
    """A command that ended on the board."""

    code: int  # its exit code
    stdout: bytes
    stderr: str


class BoardError(DeviceError):
    """The board or the way to it failed, whatever was asked of it: another board may do, this one may be set aside."""


class BusyError(DeviceError):
    """Somebody else measures on the board."""


@dataclass(frozen=True)
class Fault:
    """Meaning of a message of ssh or adb."""

    pattern: str  # a regular expression, found anywhere in the message
    found: str
    expected: str
    do: str
    error: type[DeviceError] = BoardError


class Transport(ABC):
    """A way to one board, made of a program's command lines. Every call has a deadline in seconds.

    A deadline that passes is a `DeviceError`, and so is every other failure. Files may be kept in `folder`, relative to where
    the board's commands start.
    """

    program = ""
    lost: tuple[int, ...] = ()  # exit codes that can be the program's own failure
    faults: tuple[Fault, ...] = ()

    def __init__(self, name: str, folder: str) -> None:
        self.name, self.folder = name, folder

    @abstractmethod
    def command(self, argv: Sequence[str]) -> list[str]:
        """The local command line that runs `argv` on the board."""

    @abstractmethod
    def push_command(self, source: str, remote: str) -> list[str]:
        """The local command line that copies a file to the board."""

    @abstractmethod
    def pull_command(self, remote: str, target: str) -> list[str]:
        """The local command line that copies a file from the board."""

    def run(self, argv: Sequence[str], deadline_s: float) -> Completed:
        """Run a program on the board with exactly these arguments."""
        done = self._local(self.command(argv), deadline_s, f"running {argv[0]}")
        if done.code in self.lost and (fault := self.explain(done.stderr)) is not None:
            raise fault
        return done

    def do(self, argv: Sequence[str], deadline_s: float) -> None:
        """Run a program that fails only where the board's folder cannot be written.

        Raises:
            BoardError: it failed.
        """
        done = self.run(argv, deadline_s)
        if done.code != 0:
            where, found = f"{argv[0]} in {self.folder}", " ".join(done.stderr.split())[:300] or f"exit code {done.code}"
            raise self.error(where, found, "a folder that can be written", "set `folder` in the board's file")

    def error(self, what: str, found: str, expected: str, do: str = "") -> BoardError:
        """An error of this board."""
        return BoardError(f"board {self.name}: {what}", found=found, expected=expected, do=do)

    def late(self, what: str, deadline_s: float) -> BoardError:
        """The error for a deadline that passed."""
        do = "it was given up; see whether the board hangs or the link is down"
        return self.error(what, f"no answer after {deadline_s:.0f} s", "an answer", do)

    def push(self, source: Path, remote: str, deadline_s: float) -> None:
        """Copy a file to the board."""
        self._copy(self.push_command(str(source), remote), deadline_s, f"sending {source.name}")

    def pull(self, remote: str, target: Path, deadline_s: float, most: int = MOST_FILE) -> None:
        """Copy a file of at most `most` bytes from the board."""
        self._copy(self.pull_command(remote, str(target)), deadline_s, f"fetching {remote}", (target, most))

    def write(self, data: bytes, remote: str, deadline_s: float) -> None:
        """Write a file on the board."""
        with tempfile.NamedTemporaryFile(prefix="edge-compress-") as file:
            file.write(data)
            file.flush()
            self.push(Path(file.name), remote, deadline_s)

    def replace(self, data: bytes, remote: str, deadline_s: float) -> None:
        """Write a file on the board, whole or not at all."""
        self.write(data, f"{remote}.part", deadline_s)
        self.do(["mv", f"{remote}.part", remote], deadline_s)

    def read(self, remote: str, deadline_s: float, most: int = MOST_READ) -> bytes:
        """The content of a file of at most `most` bytes on the board."""
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            self.pull(remote, Path(folder) / "file", deadline_s, most)
            return (Path(folder) / "file").read_bytes()

    def open(self, argv: Sequence[str], deadline_s: float) -> Stream:
        """Start the agent there: its stream, positioned at its first frame."""
        return Stream(self, self.command(argv), deadline_s)

    def close(self) -> None:  # noqa: B027 - most transports keep nothing open
        """Leave nothing running on this machine; safe to call twice."""

    def connected(self) -> bool:
        """False where the link itself is known to be down; asked when a stream has ended without a message."""
        return True

    def explain(self, message: str) -> DeviceError | None:
        """The error for a message of the program or of the board's shell; None for an unknown message."""
        for fault in (*self.faults, *BOARD_FAULTS):
            if re.search(fault.pattern, message):
                return fault.error(f"board {self.name}", found=fault.found, expected=fault.expected, do=fault.do)
        return None

    def _copy(self, command: Sequence[str], deadline_s: float, what: str, into: tuple[Path, int] | None = None) -> None:
        done = self._local(command, deadline_s, what, into)
        if done.code != 0:
            found = last_line(done.stderr) or f"exit code {done.code}"
            raise self.explain(done.stderr) or self.error(what, found, "a copy")

    def _local(self, command: Sequence[str], deadline_s: float, what: str, into: tuple[Path, int] | None = None) -> Completed:
        """Run a program here until it ends, the deadline passes, or the file that it writes `into` exceeds its size.

        Output goes to files: a connection that ssh keeps open in the background would hold a pipe open with it.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = start(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            deadline = time.monotonic() + deadline_s
            try:
                while True:
                    try:
                        code = process.wait(min(_LOOK_S, max(0.0, deadline - time.monotonic())))
                        break
                    except subprocess.TimeoutExpired as error:
                        if time.monotonic() >= deadline:
                            raise self.late(what, deadline_s) from error
                        self._bounded(what, into, out, err)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            self._bounded(what, into, out, err)
            out.seek(0)
            err.seek(0)
            return Completed(code, out.read(), err.read().decode(errors="replace"))

    def _bounded(self, what: str, into: tuple[Path, int] | None, *outputs: IO[bytes]) -> None:
        """Raises BoardError if the output exceeds `MOST_OUTPUT`, or the file `into` its size."""
        if into is not None and into[0].is_file() and into[0].stat().st_size > into[1]:
            raise self.error(what, f"more than {into[1]} bytes", "no more", "see what is in that file on the board")
        if any(os.fstat(output.fileno()).st_size > MOST_OUTPUT for output in outputs):
            raise self.error(what, f"more than {MOST_OUTPUT >> 20} MiB of output", "a few lines")


class Stream:
    """The agent's stdin and stdout across a transport. Every request has a deadline; what fails closes it.

    Raises:
        AgentEnded: it ended instead of starting; a `DeviceError` with its exit code.
        DeviceError: the board cannot be reached.
    """

    def __init__(self, transport: Transport, command: Sequence[str], deadline_s: float) -> None:
        self._transport = transport
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        try:
            self.process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr)
        except BaseException:
            self._stderr.close()
            raise
        assert self.process.stdin is not None  # both are pipes
        assert self.process.stdout is not None
        self._channel = Channel(self.process.stdout.fileno(), self.process.stdin.fileno())
        try:
            start_by = time.monotonic() + deadline_s
            self._waited_for(lambda until: self._channel.skip_to(MAGIC, until), start_by, "starting the agent")
        except Late as error:
            self.close()
            raise transport.late("starting the agent", deadline_s) from error
        except Gone as error:
            raise self._ended("starting the agent", "") from error
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any], deadline_s: float, what: str, payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """The agent's answer, refusals included: (header, payload).

        The board may take `deadline_s` seconds; the answer may arrive LINK_SLACK_S later.

        Raises:
            DeviceError: the link, the agent or the board failed, or took too long. The stream is closed then.
            BoardError: it was closed before.
        """
        if self._stderr.closed:  # cleaning up after an error asks too, and must not hide that error behind another kind
            raise self._transport.error(what, "a connection that was closed", "an open one")
        deadline = time.monotonic() + deadline_s + LINK_SLACK_S
        try:
            self._bounded(what)
            self._channel.send({**request, "deadline_s": deadline_s}, payload, deadline)
            most = MOST_PAYLOAD if request["op"] == "run" else 0  # outputs alone come as a payload
            return self._waited_for(lambda until: self._channel.receive(until, most=most), deadline, what)
        except Late as error:
            self.close()
            raise self._transport.late(what, deadline_s + LINK_SLACK_S) from error
        except Gone as error:
            raise self._ended(what, str(error)) from error
        except BaseException:  # an interrupt too: the next answer would be that of another request
            self.close()
            raise

    def close(self) -> None:
        """End the local program, and with it the agent, which sees its stdin close; safe to call twice."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                stream and stream.close()

    def _waited_for(self, take: Callable[[float], Taken], deadline: float, what: str) -> Taken:
        """What `take` gives until `deadline`; while it is waited for, the messages are kept within their bound."""
        while True:
            try:
                return take(min(deadline, time.monotonic() + _LOOK_S))
            except Late:
                if time.monotonic() >= deadline:
                    raise
            self._bounded(what)

    def _bounded(self, what: str) -> None:
        if os.fstat(self._stderr.fileno()).st_size > MOST_OUTPUT:
            raise self._transport.error(what, f"more than {MOST_OUTPUT >> 20} MiB of messages", "an answer")

    def _ended(self, what: str, how: str) -> DeviceError:
        """Why the stream ended: the link's own message, else the agent's exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closes a moment before it can be waited for
            self.process.wait(5)
        code = self.process.poll()
        self._stderr.seek(-min(4000, os.fstat(self._stderr.fileno()).st_size), os.SEEK_END)
        message = self._stderr.read(4000).decode(errors="replace")
        self.close()
        known = self._transport.explain(message)
        if known is not None:
            return known
        if code in self._transport.lost and not self._transport.connected():
            do = "see its power and network, then run the same command again"
            return self._transport.error(what, "the link went down", "a connection that lasts", do)
        told = [how and f"the answer broke off: {how}", last_line(message)]
        return AgentEnded(self._transport.name, what, code, ": ".join(t for t in told if t))


class AgentEnded(BoardError):
    """The agent ended and the link did not say why."""

    def __init__(self, board: str, what: str, code: int | None, told: str) -> None:
        self.code = code
        found = "the agent on the board ended" + (f" with exit code {code}" if code else "") + (f" ({told})" if told else "")
        do = "it was killed there or the link broke; run the same command again"
        super().__init__(f"board {board}: {what}", found=found, expected="an answer", do=do)


_LOOK_S = 1.0  # between looks at how much it has written
LINK_SLACK_S = 15.0  # of a request, for the way there and back; ssh notices a dead link after as long
# what a board's own shell and tools say
BOARD_FAULTS = (
    Fault(
        r"busy: process \d+ measures",
        "it is busy: another process measures on it",
        "a board of one's own",
        "wait until that has ended",
        BusyError,
    ),
    Fault(
        r"(python\S*: (inaccessible or )?(command )?not found|python\S*: No such file|not found: \S*python)",
        "no python3 on the board",
        "Python 3.8 or newer",
        "install it there, or set `python` in the board's file",
    ),
    Fault(
        r"No space left on device",
        "its disk is full",
        "space for the model files",
        "remove files there, or set `folder` in the board's file",
    ),
    Fault(
        r"Permission denied|Read-only file system",
        "permission denied",
        "a login and a folder that may be used",
        "see its login and the board file's `folder`",
    ),
)


def start(command: Sequence[str], *, stdin: int, stdout: int | IO[bytes], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a program of this machine in a session of its own: Ctrl-C is for the parent, which closes it.

    Raises:
        UnavailableError: the program is not installed.
    """
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
    except FileNotFoundError as error:
        raise UnavailableError(f"program {command[0]}", found="not on this machine", do=f"install {command[0]}") from error


def last_line(text: str) -> str:
    """The last non-empty line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
