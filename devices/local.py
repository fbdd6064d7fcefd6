"""This machine as a device: a board without a link, measured by the same agent in the same rounds as every other one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

from .board import Board
from .remote import RemoteDevice
from .transport.base import Transport
from .transport.connection import Connection

THIS_MACHINE = Board("local", ("x86",), "local")


class HereTransport(Transport):
    """Commands of this machine, with no link between; `folder` is an absolute path."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """See `Transport.command`; a user's own json.py in the current folder stays out of Python's way."""
        return ["env", "PYTHONSAFEPATH=1", *argv]

    def push_command(self, source: str, remote: str) -> list[str]:
        """See `Transport.push_command`."""
        return ["cp", "--", source, remote]

    def pull_command(self, remote: str, target: str) -> list[str]:
        """See `Transport.pull_command`."""
        return ["cp", "--", remote, target]


class LocalDevice(RemoteDevice):
    """This machine, under the name of the board that describes it; see `device.Device`.

    Every connection has an agent and a folder of its own, so that two can be open at once.
    """

    def __init__(self, board: Board = THIS_MACHINE) -> None:
        super().__init__(board, HereTransport(board.name, tempfile.gettempdir()))

    def connect(self) -> Connection:
        """An agent on this machine, with this Python; see `Connection`."""
        folder = tempfile.TemporaryDirectory(prefix="edge-compress-")
        transport = HereTransport(self.name, folder.name)
        try:
            return Connection(transport, self.name, sys.executable, folder.cleanup, self.board.emulated)
        except BaseException:
            folder.cleanup()
            raise


def describe(runtime: str = "onnxruntime") -> dict[str, str]:
    """Facts of this machine that latencies depend on: cpu, governor, runtime version and so on.

    Raises:
        UnavailableError: the runtime is not installed.
    """
    with LocalDevice().connect() as agent:
        machine = agent.hello()["machine"]
        return {str(k): str(v) for k, v in machine.items()} | {"runtime_version": agent.runtime(runtime)[1]}
