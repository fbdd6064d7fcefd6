"""Measures what an artifact takes on a device beside its latency: memory, and time layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ...pipeline.errors import UnavailableError
from ..transport.connection import Connection
from .timing import TimingSettings

_LAYER_SECONDS, _LAYER_RUNS = 2.0, (20, 500)  # the runtime's profiler is asked for that long, in so many inferences
_LAYER_DEADLINE_S = 120.0


@dataclass(frozen=True)
class LayerTime:
    """A layer, or all operators of one kind that belong to none."""

    name: str  # of the layer in the PyTorch network where the file tells, else the runtime's own
    kind: str  # the runtime's operator
    ms: float  # of an inference


@dataclass(frozen=True)
class Usage:
    """Memory of an artifact and of its dense baseline, each alone with the runtime, and the artifact's time by layer."""

    dense_peak_rss_bytes: int
    peak_rss_bytes: int
    layers: tuple[LayerTime, ...]  # empty where the runtime has no profiler


def measured_usage(
    agent: Connection, path: Path, settings: TimingSettings, p50_ms: float | None
) -> tuple[int, tuple[LayerTime, ...], str]:
    """Returns peak memory in bytes, times by layer under the runtime's own names, and a note where there are none.

    Args:
        agent: of the device.
        path: of the artifact.
        settings: of the runtime.
        p50_ms: median latency, which says how many inferences are profiled; None: only the memory is measured.

    Raises:
        DeviceError, BuildError: see `Connection`.
    """
    model = agent.load(path, settings.runtime, settings.threads, settings.affinity)
    model.feed_random(settings.seed)
    peak, note = model.peak_rss_bytes(), ""
    layers: tuple[LayerTime, ...] = ()
    if p50_ms is not None:
        least, most = _LAYER_RUNS
        runs = min(max(math.ceil(_LAYER_SECONDS * 1e3 / p50_ms), least), most)
        try:
            layers = tuple(LayerTime(name, kind, ns / 1e6) for name, kind, ns in model.layers(runs, _LAYER_DEADLINE_S))
        except UnavailableError as error:
            note = f"no times by layer: {error.found}"
    model.unload()
    return peak, layers, note
