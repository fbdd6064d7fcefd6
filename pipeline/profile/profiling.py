"""Measures artifacts on a device for `edge-compress profile`: latency, whole and layer by layer, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...devices.access import open_named
from ...devices.device import Device
from ...devices.measure.stats import percentiles
from ...devices.measure.timing import TimingSettings
from ...devices.measure.usage import LayerTime, measured_usage
from ...devices.pool import Pool
from ...devices.tensorrt.device import TensorRtDevice
from ...devices.tensorrt.engines import Engines
from ...devices.transport.connection import Connection
from ..errors import InputError
from ..progress import Progress
from ..types import Kind, Percentiles, Timing
from .layer_names import merged

CURRENT_SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One artifact; the baseline's row has no timing of its own."""

    name: str
    latency: Percentiles
    against: Timing | None = None  # measured together with the baseline
    peak_rss_bytes: int = 0  # of a process that holds the runtime and this model alone
    layers: tuple[LayerTime, ...] = ()  # empty where the runtime has no profiler


@dataclass(frozen=True)
class Profile:
    """Latencies of artifacts on a device; the first row is the baseline. JSON by `types.to_json`."""

    device: str
    kind: Kind  # of all times in it
    runtime: str
    threads: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    schema: int = CURRENT_SCHEMA


def profile(models: Sequence[Path], device: str, settings: TimingSettings, ui: Progress) -> Profile:
    """Latency of artifacts of one runtime on a device (as for `--device`), each interleaved with the first, the baseline.

    Raises:
        InputError, DeviceError, BuildError, UnavailableError: see `device.Device`.
    """
    with closing(open_named(device)) as opened:
        if settings.runtime == "tensorrt" and isinstance(opened, Pool):
            raise InputError(f"--device {device} for an engine", found="a class of boards", expected="one board, by its name")
        rows, kind = _timed(models, opened, settings, ui)
        if isinstance(opened, TensorRtDevice):
            with opened.engines() as engines:
                layered = tuple(_engine_layers(engines, row, path) for row, path in zip(rows, models, strict=True))
            notes_of = ("memory: trtexec does not tell it", "times by layer: with trtexec's profiler attached")
            return Profile(opened.name, kind, settings.runtime, settings.threads, layered, notes_of)
        with opened.connect() as agent:
            looked, notes = [], []
            for row, path in zip(rows, models, strict=True):
                more, note = _looked_into(agent, row, path, settings)
                looked.append(more)
                notes += [note] if note and note not in notes else []
        return Profile(agent.name, kind, settings.runtime, settings.threads, tuple(looked), tuple(notes))


def _timed(models: Sequence[Path], device: Device, settings: TimingSettings, ui: Progress) -> tuple[tuple[Row, ...], Kind]:
    baseline, *others = models
    if not others:
        with ui.bar(baseline.name, settings.sessions) as bar:
            measured = device.sessions(baseline, (), settings, lambda *_: bar.advance())
        samples_ms = np.concatenate([s.baseline.wall_ns for s in measured]) / 1e6
        return (Row(str(baseline), Percentiles(*percentiles(samples_ms))),), Kind.MEASURED
    timings = []
    for model in others:
        with ui.bar(model.name, settings.sessions + 1) as bar:  # one more: the baseline against itself
            timings.append(device.measure(baseline, model, settings, lambda *_: bar.advance()))
    rows = (Row(str(model), timing.artifact, timing) for model, timing in zip(others, timings, strict=True))
    return (Row(str(baseline), timings[0].dense), *rows), timings[0].kind


def _looked_into(agent: Connection, row: Row, path: Path, settings: TimingSettings) -> tuple[Row, str]:
    """The row with memory and layers; and a note where there are no layers."""
    peak, layers, note = measured_usage(agent, path, settings, row.latency.p50_ms)
    return replace(row, peak_rss_bytes=peak, layers=merged(path, layers)), note


def _engine_layers(engines: Engines, row: Row, path: Path) -> Row:
    """The row with an engine's layers, which TensorRT names after the nodes it fused."""
    layers = engines.layers(engines.engine(path))
    return replace(row, layers=tuple(LayerTime(layer.name, "", layer.average_ms) for layer in layers))


def table(result: Profile) -> tuple[str, ...]:
    """The profile as lines of text, with notes on the quality of the figures."""
    rows = result.rows
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'p50 ms':>9} {'p90 ms':>9} {'p99 ms':>9} {'peak MB':>8}  {'faster':>7}  95 % interval"]
    for row in rows:
        q, timing = row.latency, row.against
        cells = f"{row.name:{width}}  {q.p50_ms:9.3f} {q.p90_ms:9.3f} {q.p99_ms:9.3f} {row.peak_rss_bytes / 1e6:8.1f}"
        if timing is not None:
            low, high = timing.speedup.ci95
            cells += f"  {timing.speedup.median:6.2f}x  {low:.2f} to {high:.2f}"
            cells += f" ({', '.join(timing.quality)})" if timing.quality else ""
        lines.append(cells)
    lines += _by_layer(rows)
    floors = [row.against.noise_floor for row in rows if row.against is not None]
    if floors:
        lines.append(f"noise floor: the first against itself differs by {max(floors):.1%}")
    if result.kind is not Kind.MEASURED:
        lines.append(f"{result.device} is {result.kind}: its times are not those of any device")
    return (*lines, *result.notes)


def layer_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """The layers of all rows, in the baseline's order, then those only others have."""
    return tuple(dict.fromkeys(layer.name for row in rows for layer in row.layers))


def _by_layer(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of each layer in each model; a dash where it is not there."""
    names = layer_names(rows)
    if not names:
        return []
    width = max(map(len, names))
    times = [{layer.name: layer.ms for layer in row.layers} for row in rows]
    lines = ["", f"{'by layer, ms':{width}}  " + " ".join(f"{Path(row.name).name[:14]:>14}" for row in rows)]
    for name in names:
        cells = (f"{found[name]:14.4f}" if name in found else f"{'-':>14}" for found in times)
        lines.append(f"{name:{width}}  " + " ".join(cells))
    return [*lines, ""]
