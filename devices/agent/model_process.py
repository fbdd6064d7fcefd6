"""A process that holds a runtime and some models, as the agent sees it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any

from .frames import Channel, Gone, Late, Refusal


class ModelProcess:
    """A process that holds a runtime out of one of its packages, and some models; what kills it becomes an answer."""

    def __init__(self, host: Channel, package: str) -> None:
        command = [sys.executable, sys.argv[0], "--model"]
        quiet = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")  # the runtime gets its own number
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=quiet)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.channel = Channel(self.process.stdout.fileno(), self.process.stdin.fileno())
        self.host, self.package = host, package

    def ask(self, header: dict[str, Any], payload: bytes = b"", deadline: float | None = None) -> tuple[dict[str, Any], bytes]:
        """The answer of the process.

        Raises:
            Refusal: it refused, died or took too long; in the last two cases it is gone.
            OSError: the host has gone.
        """
        try:
            self.channel.send(header, payload, deadline)
            answer, data = self.channel.receive(deadline, watch=self.host)
        except Late:
            self.close()
            raise Refusal("deadline", "the model's process did not answer in time and was ended") from None
        except Gone:
            raise Refusal("died", "the model's process " + self._how_it_ended()) from None
        if not answer["ok"]:
            raise Refusal(answer["kind"], answer["error"])
        return answer, data

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closes a moment before it can be waited for
            self.process.wait(5)
        code = self.process.poll()
        self.close()
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        names: dict[int, str] = {int(s): s.name for s in signal.Signals}
        likely: dict[int, str] = {
            signal.SIGKILL: " (the kernel sends it when memory runs out)",
            signal.SIGILL: " (the runtime or the artifact needs an instruction this cpu lacks)",
        }
        return "was killed by " + names.get(-code, str(-code)) + likely.get(-code, "")
