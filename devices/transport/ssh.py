"""Boards behind the system's own ssh and scp: its configuration, keys, jump hosts and known hosts count."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from .base import Fault, Transport

# BatchMode: no interactive prompts. Host keys are always checked; nothing here can turn that off.
OPTIONS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ControlMaster=auto",
    "ControlPersist=60",
)
SSH_FOLDER = ".cache/edge-compress"  # in the home folder


class SshTransport(Transport):
    """One host over ssh: HOST, USER@HOST or a name from the user's ssh configuration, or from the file `config` instead.

    Its connection is shared by all calls and ends with `close`.
    """

    program = "ssh"
    lost = (255,)
    faults = (
        Fault(
            r"REMOTE HOST IDENTIFICATION HAS CHANGED",
            "its host key has changed",
            "the key in known_hosts",
            "remove the old key with ssh-keygen -R HOST if the board was set up again; if not, beware",
        ),
        Fault(
            r"Host key verification failed|No \S+ host key is known",
            "its host key is not known",
            "a key in known_hosts",
            "connect once by hand with ssh and compare the fingerprint",
        ),
        Fault(
            r"Permission denied \(",
            "the login was refused",
            "a key the board accepts",
            "run ssh-copy-id, or load the key (ssh-add)",
        ),
        Fault(r"Could not resolve hostname", "no such host name", "a name or address", "see `address` in the board's file"),
        Fault(
            r"No route to host|Network is unreachable|Connection timed out|Operation timed out",
            "no route to it",
            "a board that answers",
            "see its power, its cable and `address` in the board's file",
        ),
        Fault(r"Connection refused", "nothing listens for ssh on it", "an ssh server", "start sshd on the board"),
        Fault(
            r"not responding|Connection reset|Broken pipe|[Cc]onnection (to \S+ )?closed by|client_loop: send disconnect",
            "the link went down",
            "a connection that lasts",
            "see its power and network, then run the same command again",
        ),
    )

    def __init__(self, name: str, host: str, folder: str = SSH_FOLDER, config: Path | None = None) -> None:
        super().__init__(name, folder)
        self._host = host
        self._sockets = Path(tempfile.mkdtemp(prefix="ec-"))  # short: a socket's path holds 104 characters
        weakref.finalize(self, shutil.rmtree, self._sockets, ignore_errors=True)  # of one that is never closed
        options = [*OPTIONS, f"ControlPath={self._sockets}/%C"]
        self._options = [*(("-F", str(config)) if config else ()), *(part for o in options for part in ("-o", o))]

    def command(self, argv: Sequence[str]) -> list[str]:
        """See `Transport.command`."""
        return [self.program, *self._options, "-T", "--", self._host, shlex.join(argv)]

    def push_command(self, source: str, remote: str) -> list[str]:
        """See `Transport.push_command`."""
        return ["scp", "-q", *self._options, "--", source, self._place(remote)]

    def pull_command(self, remote: str, target: str) -> list[str]:
        """See `Transport.pull_command`."""
        return ["scp", "-q", *self._options, "--", self._place(remote), target]

    def _place(self, remote: str) -> str:
        """A file on the board as scp knows it: an IPv6 address in brackets, else its end would be the path."""
        user, at, host = self._host.rpartition("@")
        return f"{user}{at}{f'[{host}]' if ':' in host else host}:{remote}"

    def connected(self) -> bool:
        """Whether the shared connection is up: ssh notices a dead link in it and removes its socket without a message."""
        return any(self._sockets.iterdir())

    def close(self) -> None:
        """End the shared connection; safe to call twice."""
        if self._sockets.exists():
            if any(self._sockets.iterdir()):
                command = [self.program, *self._options, "-O", "exit", "--", self._host]
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    subprocess.run(command, capture_output=True, timeout=10, check=False, start_new_session=True)
            shutil.rmtree(self._sockets, ignore_errors=True)
