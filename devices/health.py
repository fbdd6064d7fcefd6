"""Checks a board's state by asking the board itself: `edge-compress devices check`."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.errors import EdgeCompressError, UnavailableError
from .agent.runtimes import RUNTIMES
from .board import Board
from .measure import stats
from .measure.timing import TimingSession, TimingSettings
from .opening import open_board
from .tensorrt.device import TensorRtDevice

# A/A: short sessions, but fresh processes all the same
_SESSIONS, _PAIRS, _SECONDS = 3, 60, 3.0


@dataclass(frozen=True)
class Found:
    """What a board says of itself."""

    facts: dict[str, Any]  # see `describe_board` of the agent
    runtime: str | None  # version of the board's runtime, which was started there; None: it cannot be
    why_not: str = ""


def describe(board: Board) -> Found:
    """Ask a board what it is, and start its runtime.

    Raises:
        DeviceError: it cannot be reached, is busy, or has no Python.
        InputError: a template without an address.
    """
    with contextlib.closing(open_board(board)) as device, device.connect() as session:
        facts = session.hello()
        if isinstance(device, TensorRtDevice):
            try:
                return Found(facts, f"tensorrt {device.version(session)}")
            except UnavailableError as error:
                return Found(facts, None, str(error))
        if board.runtime not in RUNTIMES:
            version = facts["runtimes"].get(board.runtime)
            return Found(facts, version, "" if version else f"runtime {board.runtime} is not installed on it")
        try:
            return Found(facts, " ".join(session.runtime(board.runtime)))
        except EdgeCompressError as error:  # an import can also kill its process
            return Found(facts, None, f"runtime {board.runtime} cannot be started on it ({error.found or error})")


def noise_floor(board: Board) -> tuple[float, tuple[float, float], tuple[TimingSession, ...]]:
    """A small network measured against itself on the board: (|ratio - 1|, 95 % interval of the ratio, the sessions).

    Raises:
        UnavailableError: the runtime is not there, or the board is emulated.
        DeviceError: see `RemoteDevice.sessions`.
    """
    if board.runtime not in ("onnxruntime", "tensorrt"):
        raise UnavailableError(f"runtime {board.runtime}", found="no network for it to measure the noise floor with")
    settings = TimingSettings(
        threads=board.threads,
        affinity=board.affinity,
        runtime=board.runtime,
        sessions=_SESSIONS,
        max_pairs=_PAIRS,
        max_seconds=_SECONDS,
        warmup_seconds=1.0,
    )
    with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder, contextlib.closing(open_board(board)) as device:
        model = Path(folder) / "probe.onnx"
        model.write_bytes(_network())
        sessions = device.sessions(model, [model], settings)
    median, low, high = stats.two_level_bootstrap([s.ratios() for s in sessions], block=settings.block, seed=0)
    return abs(median - 1.0), (low, high), sessions


def lines(board: Board, seen: Found) -> tuple[str, ...]:
    """What was found, one thing a line; what cannot be read is said."""
    gib, found = 1 << 30, seen.facts
    machine, heat, clocks = found["machine"], found["temperatures_c"], found["clocks_mhz"]
    where = f" at {board.address}" if board.address else ""
    installed = ", ".join(f"{n} {v}" for n, v in found["runtimes"].items()) or "none"
    rows = {
        "reachable": f"yes, by {board.transport}{where}",
        "machine": f"{machine['board'] or machine['cpu']}, {machine['machine']}, {machine['cpus']} cpus",
        "python": machine["python"],
        "runtime": f"{seen.runtime or f'{board.runtime} does not start'} (installed: {installed})",
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


def noise_line(floor: float, interval: tuple[float, float], sessions: tuple[TimingSession, ...]) -> str:
    """The noise floor as a line."""
    pairs = sum(len(s.baseline.wall_ns) for s in sessions)
    text = f"a network against itself differs by {floor:.1%} ({interval[0]:.3f} to {interval[1]:.3f}, {pairs} pairs)"
    return f"{'noise floor':11} {text}"


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
