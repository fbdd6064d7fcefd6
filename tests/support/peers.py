"""Real peers for the tests: sshd on a loopback port or in a network namespace of its own, adbd, an Arm user space under QEMU.

Everything lies in namespaces that end with the peer's process. Where something cannot run here, the test that wanted it is
skipped and says what is missing.
"""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from edge_compress.devices.board import Board
from edge_compress.devices.remote import RemoteDevice
from edge_compress.devices.transport.ssh import SshTransport

ROOTS = Path(__file__).parents[2] / "build" / "devices"  # made by make_roots.py
SBIN = os.environ["PATH"] + ":/usr/sbin:/sbin:/usr/local/sbin"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# what the kernel is told of aarch64 programs: ELF, 64 bits, little endian, machine 183
ARM64_MAGIC = (
    r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
)
# ONNX Runtime looks here for what the processor can; the kernel's own says what the machine under the emulator is
CORTEX_A76 = (
    "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop"
    " asimddp\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 0\n\n"
)


def program(name: str) -> str:
    """The path of a program, or the test is skipped."""
    found = shutil.which(name, path=SBIN)
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("namespaces of its own need root")


def do(*argv: object) -> None:
    """Run a program that has to work; the test is skipped when the machine does not allow it."""
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{argv[0]}: {done.stderr.strip() or done.returncode}")


@dataclass
class Sshd:
    """A running sshd and how to reach it."""

    process: subprocess.Popen[bytes]  # its parent where it runs in namespaces of its own
    folder: Path  # of keys and configurations
    board_folder: str  # where the agent keeps files, on the "board"
    python: str = sys.executable
    link: str = ""  # the network interface on this side
    emulated: bool = False
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """The client's configuration."""
        return self.folder / "client"

    def device(self, host: str = "loop", name: str = "loop", **board: object) -> RemoteDevice:
        about = {"targets": ("x86",), "python": self.python, "emulated": self.emulated, "folder": self.board_folder} | board
        found = Board(name, transport="ssh", address=host, **about)  # type: ignore[arg-type]
        return RemoteDevice(found, SshTransport(name, host, found.folder, self.config))

    def pid(self) -> int:
        """Of sshd itself."""
        deadline = time.monotonic() + 10
        while not (text := (self.folder / "pid").read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return int(text)

    def connections(self) -> list[int]:
        """Processes of sshd that serve a connection."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.pid())], capture_output=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def agent_pid(self) -> int:
        """Of the agent that works now, once there is one."""
        lock, deadline = Path(self.board_folder) / "lock", time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                pid = int(self.read(lock))
                if Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                    return pid
            time.sleep(0.05)
        raise AssertionError("no agent has started")

    def model_pids(self) -> list[int]:
        """Of the processes of the agent's models."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.agent_pid())], capture_output=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def inside(self, *argv: object) -> None:
        """Run a program in sshd's own mount namespace, where it has one."""
        do("nsenter", "-t", self.pid(), "-m", *argv)

    def read(self, path: Path) -> str:
        """A file as sshd's mount namespace has it."""
        return Path(f"/proc/{self.pid()}/root{path}").read_text()

    def programs(self) -> Path:
        """A folder with ssh and scp that use this configuration: for PATH of a process that knows nothing of it."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        for name in ("ssh", "scp"):
            file = folder / name
            file.write_text(f'#!/bin/sh\nexec {program(name)} -F {self.config} "$@"\n')
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return folder


def make_keys(folder: Path, address: str, port: int, more: str = "") -> None:
    """Keys and configurations of an sshd and of its client; hosts: loop, stranger, changed, denied, loop2."""
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress {address}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile {folder}/pid\nUsePAM no\nPasswordAuthentication no\nStrictModes no\nSubsystem sftp internal-sftp\n{more}"
    )
    keys = {name: (folder / f"{name}.pub").read_text() for name in ("host", "other")}
    (folder / "known").write_text(f"[{address}]:{port} {keys['host']}")
    (folder / "changed").write_text(f"[{address}]:{port} {keys['other']}")
    hosts = {
        "loop": ("user", "known"),
        "loop2": ("user", "known"),
        "stranger": ("user", "absent"),
        "changed": ("user", "changed"),
        "denied": ("other", "known"),
    }
    (folder / "client").write_text(
        "".join(
            f"Host {name}\n  HostName {address}\n  Port {port}\n  IdentityFile {folder}/{key}\n  IdentitiesOnly yes\n"
            f"  GlobalKnownHostsFile /dev/null\n  UserKnownHostsFile {folder}/{known}\n"
            for name, (key, known) in hosts.items()
        )
    )


@contextlib.contextmanager
def started(command: list[str], folder: Path, says: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that runs until the end; skipped when it does not start. `says` is what it says when it is ready."""
    with contextlib.suppress(OSError):
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
    (folder / "pid").touch()
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while says not in log.read_text(errors="replace") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None or says not in log.read_text(errors="replace"):
            pytest.skip(f"{Path(command[0]).name} does not start: {log.read_text(errors='replace').strip()[-300:]}")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def loopback(folder: Path, more: str = "") -> Iterator[Sshd]:
    """An sshd on a high loopback port; `more` goes into its configuration."""
    sshd = program("sshd")
    make_keys(folder, "127.0.0.1", free_port(), more)
    with started([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], folder, "listening") as process:
        yield Sshd(process, folder, str(folder / "board"))


@dataclass
class Island:
    """A network namespace that one cable leads to."""

    name: str
    link: str  # this end of the cable
    address: str  # the other end's

    def cable(self, state: str) -> None:
        """Plug it in ("up") or pull it out ("down")."""
        do("ip", "link", "set", self.link, state)


@contextlib.contextmanager
def island() -> Iterator[Island]:
    """A network namespace for as long as it is used."""
    need_root()
    for name in ("ip", "nsenter", "unshare", "mount"):
        program(name)
    number = os.getpid() % 250
    made = Island(f"ec-test-{os.getpid()}", f"ec{os.getpid()}", f"10.99.{number}.2")
    do("ip", "netns", "add", made.name)
    try:
        do("ip", "link", "add", made.link, "type", "veth", "peer", "name", "far", "netns", made.name)
        do("ip", "addr", "add", f"10.99.{number}.1/30", "dev", made.link)
        do("ip", "link", "set", made.link, "up")
        far = (["addr", "add", f"{made.address}/30", "dev", "far"], ["link", "set", "far", "up"], ["link", "set", "lo", "up"])
        for command in far:
            do("ip", "-n", made.name, *command)
        yield made
    finally:
        subprocess.run(["ip", "netns", "del", made.name], check=False)  # the cable goes with it


@contextlib.contextmanager
def island_sshd(folder: Path) -> Iterator[tuple[Sshd, Island]]:
    """An sshd on an island, with mounts of its own."""
    sshd = program("sshd")
    with island() as place:
        make_keys(folder, place.address, 2222)
        board = folder / "board"
        board.mkdir()
        # ip netns exec gives it mounts of its own too
        command = ["ip", "netns", "exec", place.name, sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
        with started(command, folder, "listening") as process:
            yield Sshd(process, folder, str(board), link=place.link), place


@contextlib.contextmanager
def registered_arm64() -> Iterator[None]:
    """The kernel starts aarch64 programs under QEMU."""
    need_root()
    qemu = program("qemu-aarch64-static")
    if not (BINFMT / "register").exists():
        do("mount", "-t", "binfmt_misc", "none", BINFMT)
    if (BINFMT / "qemu-aarch64").exists():
        yield
        return
    (BINFMT / "register").write_text(f":ec-aarch64:M::{ARM64_MAGIC}:{qemu}:OCF")
    try:
        yield
    finally:
        (BINFMT / "ec-aarch64").write_text("-1")


@contextlib.contextmanager
def arm64_sshd(folder: Path, cpu: str = "cortex-a76") -> Iterator[Sshd]:
    """An sshd whose other side is a Debian for aarch64, under QEMU."""
    root, site = ROOTS / "arm64", ROOTS / "arm64-site"
    if not (root.is_dir() and site.is_dir()):
        pytest.skip("no aarch64 user space: make test-devices makes one where it can")
    sshd = program("sshd")
    port = free_port()
    with registered_arm64():
        home = Path(f"/run/edge-compress-test-{os.getpid()}")  # sshd refuses a root below a folder all may write to
        home.mkdir()
        try:
            environment = f"SetEnv QEMU_CPU={cpu} PYTHONPATH=/opt/site HOME=/root\nChrootDirectory {home}\n"
            make_keys(folder, "127.0.0.1", port, environment)
            (folder / "cpuinfo").write_text(CORTEX_A76)
            mounts = [
                f"mount --bind {root} {home}",
                f"mkdir -p {home}/opt/site {home}/tmp/board",
                f"mount --bind {site} {home}/opt/site",
                f"mount -t proc proc {home}/proc",
                f"mount --rbind /sys {home}/sys",
                f"mount --rbind /dev {home}/dev",
                f"mount --bind {folder / 'cpuinfo'} {home}/proc/cpuinfo",
                f"exec {sshd} -D -e -f {folder / 'sshd_config'}",
            ]
            command = ["unshare", "-m", "--propagation", "private", "sh", "-ec", "; ".join(mounts)]
            with started(command, folder, "listening") as process:
                yield Sshd(process, folder, "/tmp/board", python="/usr/bin/python3")
        finally:
            home.rmdir()


@dataclass
class Adbd:
    """A real adbd on an island, and the adb that knows it."""

    island: Island
    serial: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def adbd(folder: Path) -> Iterator[Adbd]:
    """Debian's adbd in a root of its own on an island. It takes every connection as root: never outside of one."""
    adb, root = program("adb"), ROOTS / "adbd"
    if not root.is_dir():
        pytest.skip("no root with adbd: make test-devices makes one where it can")
    with island() as place:
        phone = folder / "phone"
        phone.mkdir()
        mounts = [
            f"mount --bind {root} {phone}",
            f"mount -t proc proc {phone}/proc",
            f"mount --rbind /dev {phone}/dev",
            f"mkdir -p {phone}/data/local/tmp",
            f"mount -t tmpfs tmpfs {phone}/data/local/tmp",
            # its Python, and with it the runtime, is this machine's
            *(f"mkdir -p {phone}{p}; mount --bind {p} {phone}{p}" for p in _python_folders()),
            f"exec chroot {phone} /usr/lib/android-sdk/platform-tools/adbd",
        ]
        command = ["ip", "netns", "exec", place.name, "sh", "-ec", "; ".join(mounts)]
        with started(command, folder, "listening on tcp:5555") as process:
            serial = f"{place.address}:5555"
            do(adb, "start-server")
            do(adb, "connect", serial)
            try:
                yield Adbd(place, serial, process)
            finally:
                subprocess.run([adb, "kill-server"], check=False, capture_output=True)


def _python_folders() -> list[str]:
    """Where this interpreter and its packages lie."""
    return list(dict.fromkeys(str(Path(p).resolve()) for p in (sys.base_prefix, sys.prefix)))
