"""Phones and boards behind Android's own adb. With the link down adb waits for ever: every call here has a deadline."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .base import Fault, Transport, last_line

FEATURES_DEADLINE_S = 20.0
ADB_FOLDER = "/data/local/tmp/edge-compress"


class AdbTransport(Transport):
    """One device by its serial number, as `adb devices` shows it. Programs run nowhere but below /data/local/tmp."""

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
        self._adb = (self.program, "-s", serial)
        self._has_shell_v2 = False

    def command(self, argv: Sequence[str]) -> list[str]:
        """See `Transport.command`; the device is asked once whether it can run commands."""
        self._require_shell_v2()
        return [*self._adb, "shell", "-T", shlex.join(argv)]

    def push_command(self, source: str, remote: str) -> list[str]:
        """See `Transport.push_command`."""
        return [*self._adb, "push", source, remote]

    def pull_command(self, remote: str, target: str) -> list[str]:
        """See `Transport.pull_command`."""
        return [*self._adb, "pull", remote, target]

    def _require_shell_v2(self) -> None:
        """Without it a command's exit code is always 0 and its bytes are not its own (before Android 7).

        Raises:
            DeviceError: the device cannot be reached, or lacks it.
        """
        if self._has_shell_v2:
            return
        done = self._local([*self._adb, "features"], FEATURES_DEADLINE_S, "asking for features")
        features = done.stdout.decode(errors="replace").split()
        if done.code != 0:
            found = last_line(done.stderr) or f"exit code {done.code}"
            raise self.explain(done.stderr) or self.error("adb features", found, "its features")
        if "shell_v2" not in features:
            raise self.error("adb", "no shell_v2 among its features", "Android 7 or newer", "use another device")
        self._has_shell_v2 = True
