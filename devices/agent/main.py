"""Entry point: of the agent, or of the process of one model."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

from .board import digest_of
from .frames import MAGIC, Gone, Late, own_channel
from .server import GRACE_S, Agent

WRONG_FILE, BUSY = 91, 92  # exit codes


def main(arguments: list[str]) -> int:
    """Run until there is nothing left to do: the exit code.

    Args:
        arguments: `--model`, or `--folder=F --idle=S --digest=D`, where D is what the SHA-256 of the running file must be.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host decides when this process ends
    if arguments == ["--model"]:
        from .model_main import answer_requests

        answer_requests(own_channel())
        return 0
    options = dict(arg[2:].split("=", 1) for arg in arguments)
    if digest_of(Path(sys.argv[0])) != options["digest"]:
        return WRONG_FILE
    folder = Path(options["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("a+")
    if not _locked(lock.fileno()):
        lock.seek(0)
        sys.stderr.write(f"busy: process {lock.read().strip()} measures on this board\n")
        return BUSY
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    for left in folder.glob("*.part"):  # of agents that were killed
        if len(left.stem) == 64:
            with contextlib.suppress(OSError):
                left.unlink()
    channel = own_channel()
    os.write(channel.sink, MAGIC)
    told = Agent(channel, folder).serve(float(options["idle"]))
    lock.close()  # before the answer: who reads it may start the next agent at once
    if told:
        with contextlib.suppress(Gone, Late):
            channel.send({"ok": True}, b"", time.monotonic() + GRACE_S)
    return 0


def _locked(descriptor: int) -> bool:
    """Whether the folder's lock was free; an agent whose host has just gone gets two seconds to end."""
    for _ in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.1)
        else:
            return True
    return False
