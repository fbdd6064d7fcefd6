"""Where work is computed: device, autocast and threads."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import Config
from .errors import UnavailableError


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
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: not known, so the exact way
        return False
    flags = next((line.split(":", 1)[-1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags
