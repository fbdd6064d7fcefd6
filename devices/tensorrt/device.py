"""A board whose runtime is TensorRT, as a device: engines are built there by trtexec, and timed against each other.

Sessions are fresh processes as everywhere, but a process times one engine: within a session baseline and candidates take
turns, there and back, so that what drifts with the board's heat meets all of them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..board import Board
from ..device import Device
from ..measure.meter import QUICK_PAIRS, Meter
from ..measure.timing import Ratio, TimingSession, TimingSettings
from ..pool import Pool
from ..remote import RemoteDevice, wall_session
from ..transport.base import Transport
from ..transport.connection import Connection
from .engines import Engine, Engines
from .trtexec import Program

_TURNS = 2  # of each engine in a session


class TensorRtDevice(RemoteDevice):
    """See `device.Device`; models are ONNX files. `programs` may be used as trtexec there; empty: where JetPack has it."""

    def __init__(self, board: Board, transport: Transport, programs: Sequence[Program] = ()) -> None:
        super().__init__(board, transport)
        self.programs = programs

    def runtime_version(self, agent: Connection, runtime: str) -> str:
        """The version of TensorRT there, as its trtexec reports it; raises as `Engines` does."""
        return f"tensorrt {Engines(agent, '', self.programs).version}"

    @contextlib.contextmanager
    def engines(self) -> Iterator[Engines]:
        """The board's engines, while nobody else has the board."""
        with self.connect() as agent:
            yield self._engines(agent, self._state(agent))

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """See `device.Device.facts`."""
        return {key: value for key, value in super().facts(runtime, threads).items() if key not in ("host", "governor")}

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> Meter:
        """See `device.Device.meter`."""
        return TensorRtMeter(self.engines, baseline)

    def _engines(self, agent: Connection, board: dict[str, Any]) -> Engines:
        return Engines(agent, str(board["power_mode"]), self.programs)

    def _sampler(
        self, agent: Connection, before: dict[str, Any], models: Sequence[Path], settings: TimingSettings
    ) -> Callable[[int], TimingSession]:
        engines = self._engines(agent, before)
        built = [engines.engine(path) for path in models]
        return lambda number: _session(agent, engines, built, settings.max_pairs, number)


def boards_of(device: Device) -> tuple[TensorRtDevice, ...]:
    """The boards with TensorRT that a device represents: itself, or those of its class.

    None where one of them has another runtime, or is reached through another host.
    """
    found = device.devices if isinstance(device, Pool) else (device,)
    engines = tuple(one for one in found if isinstance(one, TensorRtDevice))
    return engines if len(engines) == len(found) else ()


class TensorRtMeter(Meter):
    """See `Meter`: a candidate's engine is built, which takes half a minute on a board, timed and removed."""

    def __init__(self, engines: Callable[[], contextlib.AbstractContextManager[Engines]], baseline: bytes) -> None:
        self._engines = engines
        self._folder = tempfile.TemporaryDirectory(prefix="edge-compress-")
        self._baseline, self._candidate = (Path(self._folder.name) / name for name in ("baseline.onnx", "candidate.onnx"))
        self._baseline.write_bytes(baseline)

    def close(self) -> None:
        """Remove its files; safe to call twice."""
        self._folder.cleanup()

    @cached_property
    def dense_ms(self) -> float:
        """See `Meter.dense_ms`."""
        with self._engines() as engines:
            return float(np.median(engines.times_ms(engines.engine(self._baseline), QUICK_PAIRS)[0]))

    def ratio(self, candidate: bytes) -> Ratio:
        """See `Meter.ratio`."""
        return self.ratios([candidate])[0]

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """See `Meter.ratios`: one after another, in one connection."""
        found = []
        with self._engines() as engines:
            baseline = engines.engine(self._baseline)
            for data in candidates:
                self._candidate.write_bytes(data)
                engine = engines.engine(self._candidate)
                turns = [engines.times_ms(e, QUICK_PAIRS)[0] for e in (baseline, engine, engine, baseline)]
                found.append(_ratio(turns[0], turns[1], turns[2], turns[3]))
                if engine.path != baseline.path:  # equal files have one engine
                    engines.drop(engine)
        return found


def _ratio(dense: list[float], one: list[float], other: list[float], dense_again: list[float]) -> Ratio:
    """Ratio of the medians; its uncertainty is estimated by the difference between the two turns of one engine."""
    value = np.median(one + other) / np.median(dense + dense_again)
    apart = max(abs(np.median(b) / np.median(a) - 1.0) for a, b in ((dense, dense_again), (one, other)))
    return Ratio(float(value), float(apart) / 2)


def _session(agent: Connection, engines: Engines, built: Sequence[Engine], inferences: int, number: int) -> TimingSession:
    """Every engine in turn, there and back: an even session begins with the baseline, an odd one with the last candidate."""
    order = list(range(len(built)))
    order = order if number % 2 == 0 else order[::-1]
    times: list[list[float]] = [[] for _ in built]
    warned: dict[str, None] = {}
    for turn in range(_TURNS):
        for i in order if turn % 2 == 0 else order[::-1]:
            found, said = engines.times_ms(built[i], max(inferences // _TURNS, 1))
            times[i] += found
            warned |= dict.fromkeys(said)
    length = min(map(len, times))
    facts = {
        "runtime_version": f"tensorrt {engines.version}",
        "time": "GPU compute time of trtexec: CUDA graph, spin wait, no transfers",
        **engines.gpu,
    }
    if warned:
        facts["trtexec_warns"] = "; ".join(warned)
    board = agent.hello() | {"clocks_mhz": {}}  # those of the CPU do not matter here
    return wall_session([1e6 * np.array(own[:length]) for own in times], 1, board, 0.5 * _TURNS, facts)
