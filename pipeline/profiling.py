"""What `edge-compress profile` and `edge-compress devices check` do: latency of artifacts on a board, and what a board lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import targets
from ..devices.boards import Board
from ..devices.health import describe, lines, noise_floor, noise_line, open_any, runtime_version
from ..devices.local import LocalDevice
from ..devices.remote import RemoteDevice
from ..devices.stats import percentiles
from ..devices.timing import TimingSettings
from .errors import UnavailableError
from .progress import Progress
from .types import Percentiles, Timing


@dataclass(frozen=True)
class Row:
    """Latency of one artifact; the baseline's row has no timing of its own."""

    name: str
    latency: Percentiles
    against: Timing | None = None  # measured together with the baseline


def profile(models: Sequence[Path], board: Board, settings: TimingSettings, ui: Progress) -> tuple[Row, ...]:
    """Latency of artifacts on a board, each measured in turn with the first, the baseline.

    Args:
        models: one or more files of one runtime.
        board: where.
        settings: the protocol's numbers.
        ui: shows a bar, a step for each session.

    Raises:
        InputError, DeviceError, BuildError, UnavailableError: see `LocalDevice.measure` and `RemoteDevice.measure`.
    """
    with open_any(board) as device:
        return _profile(models, device, settings, ui)


def _profile(
    models: Sequence[Path], device: LocalDevice | RemoteDevice, settings: TimingSettings, ui: Progress
) -> tuple[Row, ...]:
    baseline, *others = models
    if not others:
        with ui.bar(baseline.name, settings.sessions) as bar:
            measured = device.sessions(baseline, (), settings, lambda *_: bar.advance())
        samples_ms = np.concatenate([s.baseline.wall_ns for s in measured]) / 1e6
        return (Row(str(baseline), Percentiles(*percentiles(samples_ms))),)
    timings = []
    for model in others:
        with ui.bar(model.name, settings.sessions + 1) as bar:  # one more: the baseline against itself
            timings.append(device.measure(baseline, model, settings, lambda *_: bar.advance()))
    rows = (Row(str(model), timing.artifact, timing) for model, timing in zip(others, timings, strict=True))
    return (Row(str(baseline), timings[0].dense), *rows)


def table(rows: Sequence[Row]) -> tuple[str, ...]:
    """The rows as lines of text, and what to know about how good the figures are."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'p50 ms':>9} {'p90 ms':>9} {'p99 ms':>9}  {'faster':>7}  95 % interval"]
    for row in rows:
        q, timing = row.latency, row.against
        cells = f"{row.name:{width}}  {q.p50_ms:9.3f} {q.p90_ms:9.3f} {q.p99_ms:9.3f}"
        if timing is not None:
            low, high = timing.speedup.ci95
            cells += f"  {timing.speedup.median:6.2f}x  {low:.2f} to {high:.2f}"
            cells += f" ({', '.join(timing.quality)})" if timing.quality else ""
        lines.append(cells)
    floors = [row.against.noise_floor for row in rows if row.against is not None]
    if floors:
        lines.append(f"noise floor: the first against itself differs by {max(floors):.1%}")
    return tuple(lines)


@dataclass(frozen=True)
class Check:
    """What a board is like, and what stands in the way of building and measuring for its targets."""

    lines: tuple[str, ...]
    lacking: tuple[str, ...]


def check(board: Board) -> Check:
    """Ask a board what it is, and measure its noise floor where nothing is in the way.

    Raises:
        DeviceError: it cannot be reached, or does not answer.
        InputError: a template without an address.
    """
    lacking = list(_missing(board))
    found = describe(board)
    shown = list(lines(board, found))
    if runtime_version(board, found) is None:
        lacking.append(f"runtime {board.runtime} is not installed on it")
    if not lacking:
        try:
            shown.append(noise_line(*noise_floor(board)))
        except UnavailableError as error:
            lacking.append(str(error))
    return Check(tuple(shown), tuple(lacking))


def _missing(board: Board) -> tuple[str, ...]:
    found = []
    for name in board.targets:
        if name not in targets.names():
            found.append(f"{name}: there is no such target in this version")
        elif reason := targets.load(name).missing():
            found.append(f"{name}: {reason}")
    return tuple(found)
