"""Accuracy against latency of several artifacts, as inline SVG: size as area, intervals as bars, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..verify.statistics import Interval
from . import svg as plots
from .format import size
from .svg import Label

_COLOURS = (plots.BLUE, plots.RED, plots.GREEN)
_MARKERS = ("o", "s", "^", "D", "v", "p", "X")
_LARGEST = 22.0  # points across, of the largest file's marker
_SMALLEST = 4.0


@dataclass(frozen=True)
class Point:
    """An artifact, or a dense float model."""

    name: str
    latency_ms: float  # median
    latency_ci95: Interval | None
    top1: float  # percent
    top1_ci95: Interval
    size_bytes: int
    dense: bool = False


def front(points: Sequence[Point]) -> list[int]:
    """Positions of the points that no other beats or equals in both and beats in one, by latency."""
    order = sorted(range(len(points)), key=lambda i: (points[i].latency_ms, -points[i].top1))
    kept: list[int] = []
    for i in order:
        best = points[kept[-1]] if kept else None
        tied = best is not None and (points[i].latency_ms, points[i].top1) == (best.latency_ms, best.top1)
        if best is None or points[i].top1 > best.top1 or tied:
            kept.append(i)
    return kept


def plot(points: Sequence[Point], label: Label) -> str:
    """The plot. Artifacts differ by colour and by shape; dense models are grey.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("no points to draw")
    largest = max(point.size_bytes for point in points)
    with plots.new_axes(300 + 15 * len(points)) as (figure, axes):
        on_front = [points[i] for i in front(points)]
        xs, ys = [p.latency_ms for p in on_front], [p.top1 for p in on_front]
        axes.step(xs, ys, where="post", color=plots.MUTED, lw=1.2, ls=(0, (4, 3)))
        number = 0
        for point in points:
            colour = plots.MUTED if point.dense else _COLOURS[number % len(_COLOURS)]
            marker = "P" if point.dense else _MARKERS[number % len(_MARKERS)]
            number += not point.dense
            across = max(_SMALLEST, _LARGEST * math.sqrt(point.size_bytes / largest))
            axes.errorbar(
                [point.latency_ms],
                [point.top1],
                xerr=_around(point.latency_ms, point.latency_ci95),
                yerr=_around(point.top1, point.top1_ci95),
                fmt=marker,
                color=colour,
                ms=across,
                mew=0,
                alpha=0.75,
                elinewidth=1.2,
                capsize=3,
                capthick=1.2,
            )
            name = f"{plots.shortened(point.name, 34)}, {size(point.size_bytes)}"
            axes.plot([], [], marker, color=colour, ms=6, mew=0, label=name)
        axes.set_xlabel("median latency, ms (measured)")
        axes.set_ylabel("top-1 on the test split, %")
        axes.set_xlim(left=0)
        axes.grid(True)
        axes.margins(0.08)
        return plots.to_svg(figure, label, columns=2 if max(len(point.name) for point in points) < 14 else 1)


def _around(middle: float, interval: Interval | None) -> list[list[float]] | None:
    """Lengths of the error bars below and above; a median can be slightly outside its resampled interval."""
    return None if interval is None else [[max(middle - interval[0], 0.0)], [max(interval[1] - middle, 0.0)]]
