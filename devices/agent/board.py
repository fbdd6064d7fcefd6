"""Description and state of the board: processor, memory, heat, clocks, runtimes, power mode."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def describe_board(folder: Path) -> dict[str, Any]:
    """Description of the board: machine, memory, disk, heat, clocks, runtimes; what cannot be read is empty or 0."""
    memory = {line.split(":")[0]: line.split()[1] for line in _read("/proc/meminfo").splitlines() if len(line.split()) > 1}
    zones = {}
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        value = _read(zone / "temp").strip()
        if value.lstrip("-").isdigit():
            zones["{} {}".format(zone.name[12:], _read(zone / "type").strip())] = int(value) / 1000
    clocks = {}
    for cpu in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        values = [_read(cpu / name).strip() for name in ("scaling_cur_freq", "cpuinfo_min_freq", "cpuinfo_max_freq")]
        if all(v.isdigit() for v in values):
            clocks[cpu.parent.name] = [int(v) / 1000 for v in values]
    return {
        "protocol": 1,
        "pid": os.getpid(),
        "machine": describe_machine(),
        "host": host_id(),
        "boot_id": _read("/proc/sys/kernel/random/boot_id").strip(),
        "memory_total_bytes": int(memory.get("MemTotal", 0)) * 1024,
        "memory_available_bytes": int(memory.get("MemAvailable", 0)) * 1024,
        "disk_free_bytes": shutil.disk_usage(str(folder)).free,
        "temperatures_c": zones,
        "clocks_mhz": clocks,  # cpu -> [now, least, most]
        "runtimes": runtime_versions(),
        "power_mode": power_mode(),
        "emulated": emulated(),
    }


def describe_machine() -> dict[str, str]:
    """Facts that decide latency and can be read without privileges: cpu, governor, load."""
    return dict(
        _fixed(),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or "unknown",
        load_average=f"{os.getloadavg()[0]:.2f}",
    )


@functools.lru_cache(maxsize=None)  # noqa: UP033 - reading /proc/cpuinfo takes long with many cpus; 3.8 has no `cache`
def _fixed() -> dict[str, str]:
    info = _read("/proc/cpuinfo").splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith(("model name", "Model", "CPU part"))]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpus": str(usable_cpus()),
        "machine": platform.machine(),
        "board": _read("/proc/device-tree/model").strip("\0 \n"),
        "python": platform.python_version(),
    }


def runtime_versions() -> dict[str, str]:
    """Installed runtimes and their versions, read without importing them."""
    from importlib import metadata

    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "ai-edge-litert", "tflite-runtime", "executorch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = str(metadata.version(name))
    return found


def power_mode() -> str:
    """The power mode of a Jetson, such as 15W or MAXN; empty elsewhere."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, "-q"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.decode(errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if "Power Mode" in line and ":" in line), "")


def emulated() -> bool:
    """Whether this is an Arm user space on another machine's kernel, where times are meaningless."""
    arm = platform.machine().startswith(("aarch64", "arm"))
    return any(name.startswith("QEMU_") for name in os.environ) or (arm and "vendor_id" in _read("/proc/cpuinfo"))


def sensors() -> tuple[list[float], list[float]]:
    """Temperatures in degrees Celsius and frequencies in MHz; empty where the machine shows none."""
    zones = [_read(p).strip() for p in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))]
    cpus = sorted(os.sched_getaffinity(0))[:8]  # asking a cpu wakes it
    clocks = [_read(f"/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_cur_freq").strip() for n in cpus]
    return [int(z) / 1000 for z in zones if z.lstrip("-").isdigit()], [int(c) / 1000 for c in clocks if c.isdigit()]


def peak_rss(pid: int) -> int:
    """Peak resident memory of a process in bytes; 0 where it cannot be read."""
    lines = [line for line in _read(f"/proc/{pid}/status").splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such sensor on this machine
        return ""


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def host_id() -> str:
    """An identifier of this machine: systemd's machine id, else its host name."""
    return _read("/etc/machine-id").strip() or platform.node()


def usable_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process can use at once: those it may run on, and no more than its cgroup's quota pays for."""
    allowed = len(os.sched_getaffinity(0))
    quotas = list(_quotas(root))
    return max(1, min([allowed, *(math.ceil(quota) for quota in quotas)]))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that the cgroups of this process allow, its own and those above it, versions 1 and 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = base / path.lstrip("/")
        for folder in (own, *own.parents):
            if controllers:
                words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
            else:
                words = _read(folder / "cpu.max").split()
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
                yield int(words[0]) / int(words[1])
            if folder == base:
                break
