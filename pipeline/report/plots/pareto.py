"""Accuracy against latency of several artifacts, as inline SVG: size as area, intervals as bars, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...signature import TOP1, Metric
from ...verify.statistics import Interval
from ..format import labelled, size
from . import svg as plots
from .svg import Label

_COLOURS = (plots.BLUE, plots.RED, plots.GREEN)
_MARKERS = ("o", "s", "^", "D", "v", "p", "X")
_LARGEST = 22.0  # points across, of the largest file's marker
_SMALLEST = 4.0


@dataclass(frozen=True)
class Point:
    """An artifact, or a dense float model."""

    name: str
    latency: float  # median, in the unit of the axis
    latency_ci95: Interval | None
    value: float  # of the metric
    value_ci95: Interval | None
    size_bytes: int
    dense: bool = False
    failed: bool = False  # a gate


def front(points: Sequence[Point], higher_is_better: bool = True) -> list[int]:
    """Positions of the points that no other beats or equals in both and beats in one, by latency."""
    worth = [point.value if higher_is_better else -point.value for point in points]
    order = sorted(range(len(points)), key=lambda i: (points[i].latency, -worth[i]))
    kept: list[int] = []
    for i in order:
        best = kept[-1] if kept else None
        tied = best is not None and (points[i].latency, worth[i]) == (points[best].latency, worth[best])
        if best is None or worth[i] > worth[best] or tied:
            kept.append(i)
    return kept


def plot(points: Sequence[Point], label: Label, metric: Metric = TOP1, axis: str = "median latency, ms (measured)") -> str:
    """The plot. Artifacts differ by colour and by shape, those that failed a gate are hollow; dense models are grey.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("no points to draw")
    largest = max(point.size_bytes for point in points)
    with plots.new_axes(300 + 15 * len(points)) as (figure, axes):
        on_front = [points[i] for i in front(points, metric.higher_is_better)]
        xs, ys = [p.latency for p in on_front], [p.value for p in on_front]
        axes.step(xs, ys, where="post", color=plots.MUTED, lw=1.2, ls=(0, (4, 3)))
        number = 0
        for point in points:
            colour = plots.MUTED if point.dense else _COLOURS[number % len(_COLOURS)]
            marker = "P" if point.dense else _MARKERS[number % len(_MARKERS)]
            number += not point.dense
            across = max(_SMALLEST, _LARGEST * math.sqrt(point.size_bytes / largest))
            axes.errorbar(
                [point.latency],
                [point.value],
                xerr=_around(point.latency, point.latency_ci95),
                yerr=_around(point.value, point.value_ci95),
                fmt=marker,
                color=colour,
                ms=across,
                **_filled(point),
                alpha=0.75,
                elinewidth=1.2,
                capsize=3,
                capthick=1.2,
            )
            name = f"{plots.shortened(point.name, 34)}, {size(point.size_bytes)}"
            axes.plot([], [], marker, color=colour, ms=6, **_filled(point), label=name)
        axes.set_xlabel(axis)
        axes.set_ylabel(labelled(metric, " on the test split"))
        axes.set_xlim(left=0)
        axes.grid(True)
        axes.margins(0.08)
        return plots.to_svg(figure, label, columns=2 if max(len(point.name) for point in points) < 14 else 1)


def _filled(point: Point) -> dict[str, Any]:
    return {"mfc": "none", "mew": 1.5} if point.failed else {"mew": 0}


def _around(middle: float, interval: Interval | None) -> list[list[float]] | None:
    """Lengths of the error bars below and above; a median can be slightly outside its resampled interval."""
    return None if interval is None else [[max(middle - interval[0], 0.0)], [max(interval[1] - middle, 0.0)]]
