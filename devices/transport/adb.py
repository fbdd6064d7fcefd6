"""Phones and boards behind Android's own adb. With the link down adb waits for ever: every call here has a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .base import BoardError, CommandTransport, Completed, Fault, Stream, last_line, quoted

FEATURES_DEADLINE_S = 20.0
ADB_FOLDER = "/data/local/tmp/edge-compress"


class AdbTransport(CommandTransport):
    """One device by its serial number.

    Args:
        name: of the board, for messages.
        serial: as `adb devices` shows it.
        folder: where files are kept there; programs run nowhere but below /data/local/tmp.
    """

    program = "adb"
    lost = (1, 255)
    faults = (
        Fault(
            r"device (unauthorized|still authorizing)",
            "it does not trust this machine yet",
            "a device that was unlocked and asked",
            "unlock it and allow USB debugging",
        ),
        Fault(r"device offline", "it is offline", "a device that answers", "run adb reconnect, or plug it in again"),
        Fault(
            r"device '[^']*' not found|no devices/emulators found",
            "no such device",
            "a serial number from adb devices",
            "see its cable, USB debugging, and `address` in the board's file",
        ),
        Fault(
            r"cannot connect to daemon|failed to check server version|protocol fault",
            "adb's server on this machine does not answer",
            "a server that runs",
            "run adb kill-server, then the same command again",
        ),
        Fault(
            r"error: closed|connection reset",
            "the link went down",
            "a connection that lasts",
            "see its cable, run it again",
        ),
    )

    def __init__(self, name: str, serial: str, folder: str = ADB_FOLDER) -> None:
        super().__init__(name, folder)
        self._serial = serial
        self._has_shell_v2 = False

    def command(self, argv: Sequence[str]) -> list[str]:
        """See `CommandTransport.command`."""
        return [self.program, "-s", self._serial, "shell", "-T", quoted(argv)]

    def run(self, argv: Sequence[str], deadline_s: float) -> Completed:
        """See `Transport.run`."""
        self._require_shell_v2()
        return super().run(argv, deadline_s)

    def open(self, argv: Sequence[str], deadline_s: float) -> Stream:
        """See `Transport.open`."""
        self._require_shell_v2()
        return super().open(argv, deadline_s)

    def push(self, source: Path, remote: str, deadline_s: float) -> None:
        """See `Transport.push`."""
        self._copy([self.program, "-s", self._serial, "push", str(source), remote], deadline_s, f"sending {source.name}")

    def pull(self, remote: str, target: Path, deadline_s: float) -> None:
        """See `Transport.pull`."""
        self._copy([self.program, "-s", self._serial, "pull", remote, str(target)], deadline_s, f"fetching {remote}")

    def _require_shell_v2(self) -> None:
        """Without it a command's exit code is always 0 and its bytes are not its own (before Android 7).

        Raises:
            DeviceError: the device cannot be reached, or lacks it.
        """
        if self._has_shell_v2:
            return
        done = self._local([self.program, "-s", self._serial, "features"], FEATURES_DEADLINE_S, "asking for features")
        features = done.stdout.decode(errors="replace").split()
        if done.code != 0:
            raise self.explain(done.stderr) or BoardError(
                f"board {self.name}", found=last_line(done.stderr) or f"exit code {done.code}", expected="its features"
            )
        if "shell_v2" not in features:
            raise BoardError(
                f"board {self.name}",
                found="no shell_v2 among its features",
                expected="Android 7 or newer",
                do="use another device",
            )
        self._has_shell_v2 = True
