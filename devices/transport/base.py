"""How a board is reached: run a command there, copy files, hold a framed stream open. Every call has a deadline.

What differs between ssh and adb is how a command line is made and what their messages mean; the rest is here.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ...pipeline.errors import DeviceError, UnavailableError
from ..agent.frames import MAGIC, Channel, Gone, Late


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
    """What a message of ssh or adb means."""

    pattern: str  # a regular expression, found anywhere in the message
    found: str
    expected: str
    do: str
    error: type[DeviceError] = BoardError


class Transport(Protocol):
    """A way to one board. Deadlines are seconds; one that passes is a `DeviceError`, and so is every other failure."""

    @property
    def folder(self) -> str:
        """Where files may be kept on the board, relative to where its commands start."""

    def run(self, argv: Sequence[str], deadline_s: float) -> Completed:
        """Run a program on the board with exactly these arguments."""

    def push(self, source: Path, remote: str, deadline_s: float) -> None:
        """Copy a file to the board."""

    def pull(self, remote: str, target: Path, deadline_s: float) -> None:
        """Copy a file from the board."""

    def open(self, argv: Sequence[str], deadline_s: float) -> Stream:
        """Start the agent there and give its stream, positioned at its first frame."""

    def close(self) -> None:
        """Leave nothing running on this machine; safe to call twice."""


class CommandTransport:
    """A transport made of a program's command lines; `SshTransport` and `AdbTransport` say which.

    Args:
        name: of the board, for messages.
        folder: see `Transport.folder`.
    """

    program = ""
    lost: tuple[int, ...] = ()  # exit codes that can be the program's own failure
    faults: tuple[Fault, ...] = ()

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self._folder = folder

    @property
    def folder(self) -> str:
        """See `Transport.folder`."""
        return self._folder

    def command(self, argv: Sequence[str]) -> list[str]:
        """The local command line that runs `argv` on the board."""
        raise NotImplementedError

    def run(self, argv: Sequence[str], deadline_s: float) -> Completed:
        """See `Transport.run`."""
        done = self._local(self.command(argv), deadline_s, f"running {argv[0]}")
        if done.code in self.lost and (fault := self.explain(done.stderr)) is not None:
            raise fault
        return done

    def open(self, argv: Sequence[str], deadline_s: float) -> Stream:
        """See `Transport.open`."""
        return Stream(self, self.command(argv), deadline_s)

    def close(self) -> None:
        """See `Transport.close`."""

    def connected(self) -> bool:
        """Whether the link itself is known to be down (False); asked when a stream has ended without a word."""
        return True

    def explain(self, message: str, faults: Iterable[Fault] = ()) -> DeviceError | None:
        """The error a message of the program, or of the board's shell, stands for; None when it says nothing known."""
        for fault in (*faults, *self.faults, *BOARD_FAULTS):
            if re.search(fault.pattern, message):
                return fault.error(f"board {self.name}", found=fault.found, expected=fault.expected, do=fault.do)
        return None

    def _copy(self, command: Sequence[str], deadline_s: float, what: str) -> None:
        done = self._local(command, deadline_s, what)
        if done.code != 0:
            raise self.explain(done.stderr) or BoardError(
                f"board {self.name}: {what}", found=last_line(done.stderr) or f"exit code {done.code}", expected="a copy"
            )

    def _local(self, command: Sequence[str], deadline_s: float, what: str) -> Completed:
        """Run a program here until it ends or the deadline passes.

        Output goes to files: a connection that ssh keeps open in the background would hold a pipe open with it.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = start(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            try:
                code = process.wait(deadline_s)
            except subprocess.TimeoutExpired as error:
                raise late(self.name, what, deadline_s) from error
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            out.seek(0)
            err.seek(0)
            return Completed(code, out.read(), err.read().decode(errors="replace"))


class Stream:
    """The agent's stdin and stdout across a transport. Every request has a deadline; what fails closes it.

    Args:
        transport: explains what went wrong.
        command: the local command line that starts the agent on the board.
        deadline_s: seconds until the agent must have said its first word.

    Raises:
        AgentEnded: it ended instead of starting; a `DeviceError` with its exit code.
        DeviceError: the board cannot be reached.
    """

    def __init__(self, transport: CommandTransport, command: Sequence[str], deadline_s: float) -> None:
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
            self._channel.skip_to(MAGIC, time.monotonic() + deadline_s)
        except Late as error:
            self.close()
            raise late(transport.name, "starting the agent", deadline_s) from error
        except Gone as error:
            raise self._ended("starting the agent", "") from error
        except BaseException:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any], deadline_s: float, what: str, payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """The agent's answer, refusals included: (header, payload).

        Args:
            request: see the agent's package.
            deadline_s: seconds the board may take; the answer may be some seconds later.
            what: names the work in messages.
            payload: raw bytes that go with the request.

        Raises:
            DeviceError: the link, the agent or the board failed, or took too long. The stream is closed then.
        """
        deadline = time.monotonic() + deadline_s + LINK_SLACK_S
        try:
            self._channel.send({**request, "deadline_s": deadline_s}, payload, deadline)
            return self._channel.receive(deadline)
        except Late as error:
            self.close()
            raise late(self._transport.name, what, deadline_s + LINK_SLACK_S) from error
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

    def _ended(self, what: str, how: str) -> DeviceError:
        """Why the stream ended: the link's own message, else the agent's exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closes a moment before it can be waited for
            self.process.wait(5)
        code = self.process.poll()
        self._stderr.seek(0)
        message = self._stderr.read()[-4000:].decode(errors="replace")
        self.close()
        known = self._transport.explain(message)
        if known is not None:
            return known
        if code in self._transport.lost and not self._transport.connected():
            return BoardError(
                f"board {self._transport.name}: {what}",
                found="the link went down",
                expected="a connection that lasts",
                do="see its power and network, then run the same command again",
            )
        told = [how and f"the answer broke off {how}", last_line(message)]
        return AgentEnded(self._transport.name, what, code, ": ".join(t for t in told if t))


class AgentEnded(BoardError):
    """The agent ended and the link did not say why."""

    def __init__(self, board: str, what: str, code: int | None, told: str) -> None:
        self.code = code
        found = "the agent on the board ended" + (f" with exit code {code}" if code else "") + (f" ({told})" if told else "")
        do = "it was killed there or the link broke; run the same command again"
        super().__init__(f"board {board}: {what}", found=found, expected="an answer", do=do)


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


def late(board: str, what: str, deadline_s: float) -> DeviceError:
    """The error for a deadline that passed."""
    return BoardError(
        f"board {board}: {what}",
        found=f"no answer after {deadline_s:.0f} s",
        expected="an answer",
        do="it was given up; see whether the board hangs or the link is down",
    )


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def quoted(argv: Sequence[str]) -> str:
    """Arguments as one text for the board's shell, which takes every one of them as it stands."""
    return shlex.join(argv)
