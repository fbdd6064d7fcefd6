"""Decides where each target is measured: on the board asked for, on the GPU of this machine, or on its processor."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from ...devices.board import Board
from ...devices.cluster.ray_board import ADDRESS
from ...devices.device import Device
from ...devices.folders import user_cache
from ...devices.local import HereTransport, LocalDevice
from ...devices.pool import Pool
from ...devices.tensorrt import loop as tensorrt_loop
from ...devices.tensorrt.device import TensorRtDevice, boards_of
from ...targets.base import Target
from ..config import Config
from ..errors import InputError, UnavailableError


def device_for(target: Target, board: Device) -> Device | None:
    """Where a target's artifact runs: on the board asked for where that can, else on this machine; None where neither can."""
    if target.needs_device:
        return board if boards_of(board) else gpu_here()
    return LocalDevice() if boards_of(board) else board


def gpu_here() -> TensorRtDevice | None:
    """A CUDA GPU of this machine with TensorRT; None where there is none."""
    if not torch.cuda.is_available():
        return None
    programs: list[Sequence[str]] = [("trtexec",)] if shutil.which("trtexec") else []
    programs += [(sys.executable, tensorrt_loop.__file__)] if find_spec("tensorrt") is not None else []
    if not programs:
        return None
    name = f"{torch.cuda.get_device_name()} (this machine, not a Jetson)"
    board = Board(name, ("jetson",), "local", runtime="tensorrt", python=sys.executable)
    folder = user_cache() / "engines"
    return TensorRtDevice(board, HereTransport(name, str(folder)), programs)


def places_of(config: Config, chosen: Sequence[Target], board: Device) -> dict[str, Device | None]:
    """Where each target's artifact runs, by the target's name; see `device_for`.

    Raises:
        UnavailableError: nowhere, and the artifact is required.
        InputError: a budget in milliseconds without anything to measure on, or boards of other hosts for what is built on them.
    """
    found = {target.name: device_for(target, board) for target in chosen}
    lone = [target.name for target in chosen if target.needs_device]
    if lone and isinstance(board, Pool) and not boards_of(board) and all(one.runtime == "tensorrt" for one in board.boards):
        raise InputError(
            f"--device {config.device} with --target {lone[0]}",
            found="boards that other hosts reach, through Ray",
            expected="boards that this machine reaches: engines come here as files",
            do=f"unset {ADDRESS}",
        )
    absent = [name for name in lone if found[name] is None]
    if absent and config.require_artifact:
        raise UnavailableError(
            f"the engine of target {absent[0]}",
            found="no board with TensorRT, and no TensorRT with a CUDA GPU on this machine",
            expected="one of them, with --require-artifact",
            do="name a board with --device, see `edge-compress devices`",
        )
    timed = [budget for budget in config.latency_budget if budget.ratio is None]
    if timed and not any(found.values()):
        raise InputError(
            f"--latency-budget {timed[0]}",
            found="no device to measure milliseconds on",
            expected="a share of the dense model's latency, such as 0.5",
        )
    return found
