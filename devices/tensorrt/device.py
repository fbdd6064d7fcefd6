"""A board whose runtime is TensorRT, as a device: engines are built there by trtexec, and timed against each other.

Sessions are fresh processes as everywhere, but a process times one engine: within a session baseline and candidates take
turns, there and back, so that what drifts with the board's heat meets all of them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..board import Board
from ..device import Meter, Progress, Take
from ..measure.meter import QUICK_PAIRS
from ..measure.timing import Ratio, Samples, TimingSession, TimingSettings
from ..remote import RemoteDevice
from ..transport.base import Transport
from ..transport.connection import Connection
from .engines import Engine, Engines
from .trtexec import Program, Version

_TURNS = 2  # of each engine in a session


class TensorRtDevice(RemoteDevice):
    """See `device.Device`; models are ONNX files.

    Args:
        board: what is known of it.
        transport: the way to it.
        programs: what may stand for trtexec there; empty: where JetPack has it.
    """

    def __init__(self, board: Board, transport: Transport, programs: Sequence[Program] = ()) -> None:
        super().__init__(board, transport)
        self.programs = programs

    def version(self, agent: Connection) -> Version:
        """Of the TensorRT there, as its trtexec says it.

        Raises:
            UnavailableError: see `Engines`.
        """
        return Engines(agent, "", self.programs).version

    @contextlib.contextmanager
    def engines(self) -> Iterator[Engines]:
        """The board's engines, while nobody else has the board."""
        with self.connect() as agent:
            board = agent.hello()
            self._require_power_mode(str(board["power_mode"]))
            yield Engines(agent, str(board["power_mode"]), self.programs)

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """See `device.Device.facts`."""
        with self.connect() as agent:
            board = agent.hello()
            self._require_real(agent.kind())
            self._require_power_mode(str(board["power_mode"]))
            engines = Engines(agent, str(board["power_mode"]), self.programs)
        return {
            "cpu": str(board["machine"]["cpu"]),
            "board": str(board["machine"]["board"]),
            "address": f"{self.board.transport} {self.board.address}",
            "runtime_version": f"tensorrt {engines.version}",
            "power_mode": str(board["power_mode"]),
        }

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> Meter:
        """See `device.Device.meter`."""
        return TensorRtMeter(self.engines, baseline)

    @contextlib.contextmanager
    def _taking(self) -> Iterator[tuple[Take, Any]]:
        with self.connect() as agent:
            before = agent.hello()
            self._require_power_mode(str(before["power_mode"]))
            engines = Engines(agent, str(before["power_mode"]), self.programs)

            def take(
                baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None
            ) -> tuple[TimingSession, ...]:
                built = [engines.engine(path) for path in (baseline, *candidates)]
                return self._repeated(
                    before, settings, progress, lambda number: _session(agent, engines, built, settings.max_pairs, number)
                )

            yield take, agent.kind()


class TensorRtMeter:
    """See `device.Meter`: a candidate costs the building of its engine, half a minute on a board, and is gone afterwards."""

    width = 1

    def __init__(self, engines: Callable[[], contextlib.AbstractContextManager[Engines]], baseline: bytes) -> None:
        self._engines = engines
        self._folder = tempfile.TemporaryDirectory(prefix="edge-compress-")
        self._baseline, self._candidate = (Path(self._folder.name) / name for name in ("baseline.onnx", "candidate.onnx"))
        self._baseline.write_bytes(baseline)
        self._dense_ms: float | None = None

    def close(self) -> None:
        """Remove its files; safe to call twice."""
        self._folder.cleanup()

    @property
    def dense_ms(self) -> float:
        """See `device.Meter.dense_ms`."""
        if self._dense_ms is None:
            with self._engines() as engines:
                self._dense_ms = float(np.median(engines.times_ms(engines.engine(self._baseline), QUICK_PAIRS)[0]))
        return self._dense_ms

    def ratio(self, candidate: bytes) -> Ratio:
        """See `device.Meter.ratio`."""
        return self.ratios([candidate])[0]

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """One after another: there is one board."""
        found = []
        with self._engines() as engines:
            baseline = engines.engine(self._baseline)
            for data in candidates:
                self._candidate.write_bytes(data)
                engine = engines.engine(self._candidate)
                turns = [engines.times_ms(e, QUICK_PAIRS)[0] for e in (baseline, engine, engine, baseline)]
                found.append(_ratio(turns[0], turns[1], turns[2], turns[3]))
                engines.drop(engine)
        return found


def _ratio(dense: list[float], one: list[float], other: list[float], dense_again: list[float]) -> Ratio:
    """The ratio of the medians; how far apart the same engine's two turns are stands for its uncertainty."""
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
    samples = [Samples(1e6 * np.array(t[:length]), np.zeros(length), 1) for t in times]  # the GPU has no CPU clock
    board = agent.hello()
    facts = {
        "runtime_version": f"tensorrt {engines.version}",
        "power_mode": str(board["power_mode"]),
        "boot_id": str(board["boot_id"]),
        "time": "GPU compute time of trtexec: CUDA graph, spin wait, no transfers",
        **engines.gpu,
    }
    if warned:
        facts["trtexec_warns"] = "; ".join(warned)
    return TimingSession(
        baseline=samples[0],
        candidates=tuple(samples[1:]),
        stop="pairs",
        warmup_s=0.5 * _TURNS,
        temperatures_c=(tuple(float(v) for v in board["temperatures_c"].values()),),
        frequencies_mhz=(),
        peak_rss_bytes=0,
        machine={str(k): str(v) for k, v in board["machine"].items()} | facts,
    )
