"""Checks a board's state by asking the board itself: `edge-compress devices check`."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Found:
    """A board's description of itself."""

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
        engines = isinstance(device, TensorRtDevice)
        if board.runtime not in RUNTIMES and not engines:
            version = facts["runtimes"].get(board.runtime)
            return Found(facts, version, "" if version else f"runtime {board.runtime} is not installed on it")
        try:
            return Found(facts, device.runtime_version(session, board.runtime))
        except EdgeCompressError as error:  # an import can also kill its process
            if engines and not isinstance(error, UnavailableError):
                raise
            reason = str(error) if engines else f"runtime {board.runtime} cannot be started on it ({error.found or error})"
            return Found(facts, None, reason)


def noise_floor(board: Board) -> tuple[float, tuple[float, float], tuple[TimingSession, ...]]:
    """A small network measured against itself on the board: (|ratio - 1|, 95 % interval of the ratio, the sessions).

    Raises:
        UnavailableError: the runtime is not there, or the board is emulated.
        DeviceError: see `RemoteDevice.sessions`.
    """
    if board.runtime not in ("onnxruntime", "tensorrt"):
        raise UnavailableError(f"runtime {board.runtime}", found="no network for it to measure the noise floor with")
    common = TimingSettings(threads=board.threads, affinity=board.affinity, runtime=board.runtime, warmup_seconds=1.0)
    settings = replace(common, sessions=3, max_pairs=60, max_seconds=3.0)  # short, but fresh processes all the same
    with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder, contextlib.closing(open_board(board)) as device:
        model = Path(folder) / "probe.onnx"
        model.write_bytes(_network())
        sessions = device.sessions(model, [model], settings)
    median, low, high = stats.two_level_bootstrap([s.ratios() for s in sessions], block=settings.block, seed=0)
    return abs(median - 1.0), (low, high), sessions


def lines(board: Board, seen: Found) -> tuple[str, ...]:
    """The findings, one a line, including what cannot be read."""
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
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 64, 32, 32)) for name in "xy")
    graph = helper.make_graph([node], "probe", [x], [y], [numpy_helper.from_array(weight, "w")])
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
