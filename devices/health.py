"""What state a board is in, asked of the board itself: `edge-compress devices check`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.errors import UnavailableError
from . import agent, stats
from .boards import Board
from .local import LocalDevice
from .remote import RemoteDevice, open_device
from .timing import Session, TimingSettings

# A/A: short sessions, but fresh processes all the same
_SESSIONS, _PAIRS, _SECONDS = 3, 60, 3.0
_PACKAGES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "litert": ("ai-edge-litert", "tflite-runtime")}


def describe(board: Board) -> dict[str, Any]:
    """What the board says of itself; see `agent.describe_board`.

    Raises:
        DeviceError: it cannot be reached, is busy, or has no Python.
        InputError: a template without an address.
    """
    if board.transport == "local":
        return agent.describe_board(Path.home())
    with contextlib.closing(open_device(board)) as device, device.connect() as session:
        return session.hello()


def runtime_version(board: Board, found: dict[str, Any]) -> str | None:
    """Version of the board's runtime as it is installed there, None where it is not."""
    versions: dict[str, str] = found["runtimes"]
    return next((versions[p] for p in _PACKAGES.get(board.runtime, (board.runtime,)) if p in versions), None)


def noise_floor(board: Board) -> tuple[float, tuple[float, float], tuple[Session, ...]]:
    """A small network measured against itself on the board: (|ratio - 1|, 95 % interval of the ratio, the sessions).

    Raises:
        UnavailableError: the runtime is not there, or the board is emulated.
        DeviceError: see `RemoteDevice.sessions`.
    """
    if board.transport != "local" and board.runtime not in agent.RUNTIMES:
        raise UnavailableError(f"runtime {board.runtime}", found="not one the agent measures with in this version")
    settings = TimingSettings(
        threads=board.threads,
        affinity=board.affinity,
        runtime=board.runtime,
        sessions=_SESSIONS,
        max_pairs=_PAIRS,
        max_seconds=_SECONDS,
        warmup_seconds=1.0,
    )
    with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder, open_any(board) as device:
        model = Path(folder) / "probe.onnx"
        model.write_bytes(_network())
        sessions = device.sessions(model, [model], settings)
    median, low, high = stats.two_level_bootstrap([s.ratios() for s in sessions], block=settings.block, seed=0)
    return abs(median - 1.0), (low, high), sessions


def lines(board: Board, found: dict[str, Any]) -> tuple[str, ...]:
    """What was found, one thing a line; what cannot be read is said."""
    gib = 1 << 30
    machine, heat, clocks = found["machine"], found["temperatures_c"], found["clocks_mhz"]
    where = f" at {board.address}" if board.address else ""
    installed = ", ".join(f"{n} {v}" for n, v in found["runtimes"].items()) or "none"
    rows = {
        "reachable": f"yes, by {board.transport}{where}",
        "machine": f"{machine['board'] or machine['cpu']}, {machine['machine']}, {machine['cpus']} cpus",
        "python": machine["python"],
        "runtime": f"{board.runtime} {runtime_version(board, found) or 'is not installed'} (installed: {installed})",
        "memory": f"{found['memory_available_bytes'] / gib:.1f} of {found['memory_total_bytes'] / gib:.1f} GiB available",
        "disk": f"{found['disk_free_bytes'] / gib:.1f} GiB free",
        "heat": ", ".join(f"{name} {degrees:.0f} C" for name, degrees in heat.items()) or "cannot be read",
        "clocks": ", ".join(f"{cpu} {now:.0f} of {most:.0f} MHz" for cpu, (now, _, most) in clocks.items()) or "cannot be read",
        "governor": machine["governor"],
        "load": machine["load_average"],
        "power mode": found["power_mode"] or "none that can be read",
    }
    if board.emulated or found["emulated"]:
        rows["emulated"] = "yes: outputs count, times do not"
    return tuple(f"{name:11} {text}" for name, text in rows.items())


def noise_line(floor: float, interval: tuple[float, float], sessions: tuple[Session, ...]) -> str:
    """The noise floor as a line."""
    pairs = sum(len(s.baseline.wall_ns) for s in sessions)
    text = f"a network against itself differs by {floor:.1%} ({interval[0]:.3f} to {interval[1]:.3f}, {pairs} pairs)"
    return f"{'noise floor':11} {text}"


@contextlib.contextmanager
def open_any(board: Board) -> Iterator[LocalDevice | RemoteDevice]:
    """The device a board's file describes, this machine included; closed at the end."""
    if board.transport == "local":
        yield LocalDevice(board.name)
        return
    with contextlib.closing(open_device(board)) as device:
        yield device


def _network() -> bytes:
    """One convolution, 64 channels to 64, 3x3 on 32x32: some milliseconds on a small core."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((64, 64, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data
