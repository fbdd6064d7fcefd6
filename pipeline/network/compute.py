"""Where the pipeline computes: device, precision of training, and how much memory and how many threads it may take."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..errors import UnavailableError

ROOT = Path("/")
SHARE = 0.5  # of the memory that is free: the rest is for the runtime, the images and whoever else works here
LEAST_BYTES = 256 << 20


@dataclass(frozen=True)
class Compute:
    """Where scoring, reconstruction and fine-tuning run, and what they may take. The default is one processor, exact."""

    device: str = "cpu"  # torch's name
    autocast: bool = False  # bfloat16 in fine-tuning and in BatchNorm statistics; curvature and solving never use it
    memory_bytes: int = 3 << 30  # for layer Hessians, and for activations held at once
    threads: int = 1
    fixed_bytes: int = 2 << 30  # where a result depends on what fits: the same in each call on one machine


CPU = Compute()


def compute_for(config: Config) -> Compute:
    """Returns what this machine offers a run.

    Raises:
        UnavailableError: CUDA was asked for and is not here.
    """
    device = accelerator(config)
    free, whole = free_bytes(), total_bytes()
    if device == "cuda":
        on_device = torch.cuda.mem_get_info()
        free, whole = min(free, on_device[0]), min(whole, on_device[1])
    memory, most = max(LEAST_BYTES, int(SHARE * free)), int(SHARE * whole)
    if config.max_memory is not None:
        memory, most = min(memory, config.max_memory), min(most, config.max_memory)
    return Compute(device, fast_bfloat16(device), memory, threads_to_use(), most // 2)


def accelerator(config: Config) -> str:
    """The torch device to compute on.

    Raises:
        UnavailableError: CUDA was asked for and is not here.
    """
    if config.accelerator == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if config.accelerator == "cuda":
        raise UnavailableError("--accelerator cuda", found="no CUDA device", do="use --accelerator auto")
    return "cpu"


def fast_bfloat16(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device multiplies bfloat16 faster than float32: training then runs under autocast, curvature never does."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    text = _text(cpuinfo)
    flags = next((line.split(":", 1)[-1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


def threads_to_use() -> int:
    """OMP_NUM_THREADS if the user set it, else as many threads as there are usable processors."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdecimal() and int(asked) else usable_cpus()


def usable_cpus(root: Path = ROOT) -> int:
    """Processors this process may use: those of its affinity, at most the quota of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.strip().isdecimal() and period.strip().isdecimal() and int(period):
            allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def free_bytes(root: Path = ROOT) -> int:
    """Memory this process can still take: what the machine has available, at most what its control groups leave.

    Where neither is known (no Linux), 6 GiB.
    """
    fields = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) << 10 if "MemAvailable" in fields else 6 << 30
    for group in _groups(root, "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _text(group / limit).strip(), _text(group / used).strip()
            if most.isdecimal() and now.isdecimal():
                stat = dict(line.split() for line in _text(group / "memory.stat").splitlines() if len(line.split()) == 2)
                free = min(free, int(most) - int(now) + int(stat.get(cache, 0)))  # the kernel gives cached files up
    return max(0, free)


def total_bytes(root: Path = ROOT) -> int:
    """Memory of the machine, at most the limits of this process's control groups. Where neither is known, 8 GiB."""
    fields = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines() if ":" in line)
    whole = int(fields["MemTotal"].split()[0]) << 10 if "MemTotal" in fields else 8 << 30
    limits = [
        _text(group / name).strip() for group in _groups(root, "memory") for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min([whole, *(int(limit) for limit in limits if limit.isdecimal())])


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups this process is in, the innermost first; of version 2, and of the controller's version 1."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        inside = Path(path.lstrip("/"))
        found += [top / part for part in (inside, *inside.parents)]  # the last is the top: what a container sees as its own
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
