"""Renders a profile as one self-contained page: the table, and each layer's time in every artifact side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report.format import Table, aside, fixed, millis, render, size, tag
from ..report.plots import svg as plots
from ..report.plots.svg import Label
from ..types import Kind
from .profiling import Profile, Row, layer_names

_COLOURS = (plots.MUTED, plots.BLUE, plots.GREEN, plots.RED)  # the baseline's first
MOST_MODELS = len(_COLOURS)  # in the plot


def to_html(result: Profile) -> str:
    """`profile.html`, from the profile alone; everything from outside is escaped."""
    shown = [row for row in result.rows if row.layers][:MOST_MODELS]
    return render(
        "profile.html.jinja",
        result=result,
        table=latency_table(result),
        plot=layer_times(shown, result.kind) if shown else "",
        layers=by_layer(result) if shown else None,
        facts=facts(result),
    )


def latency_table(result: Profile) -> Table:
    """Percentiles, memory and ratio of every artifact."""
    kind = result.kind
    rows = []
    for row in result.rows:
        ratio = "baseline"
        if row.against is not None:
            low, high = row.against.speedup.ci95
            interval = aside(f"{fixed(low)} to {fixed(high)}", kind)
            ratio = f"{fixed(row.against.speedup.median)}× ({interval}){''.join(f', {flag}' for flag in row.against.quality)}"
        times = (tag(millis(v), kind) for v in (row.latency.p50_ms, row.latency.p90_ms, row.latency.p99_ms))
        rows.append((row.name, *times, ratio, size(row.peak_rss_bytes) if row.peak_rss_bytes else "not known"))
    head = ("Artifact", "p50, ms", "p90, ms", "p99, ms", "faster than the first (95 % interval)", "peak memory")
    return Table("Latency of one inference", head, tuple(rows))


def by_layer(result: Profile) -> Table:
    """Milliseconds of each layer."""
    times = [{layer.name: layer.ms for layer in row.layers} for row in result.rows]
    rows = tuple(
        (name, *(tag(f"{found[name]:.4f}", result.kind) if name in found else "–" for found in times))
        for name in layer_names(result.rows)
    )
    return Table("Time by layer, ms", ("Layer", *(Path(row.name).name for row in result.rows)), rows)


def facts(result: Profile) -> Table:
    """Where and how it was measured."""
    rows = [("Device", result.device), ("Kind of all times", str(result.kind)), ("Runtime", result.runtime)]
    rows.append(("Threads", str(result.threads)))
    timed = [row.against for row in result.rows if row.against is not None]
    if timed:
        rows.append(("Noise floor", f"{max(t.noise_floor for t in timed):.1%} (the baseline against itself)"))
        rows.append(("Sessions", ", ".join(f"{t.sessions} processes, {t.pairs} pairs" for t in timed)))
        rows += sorted(timed[0].environment.items())
    return Table("How it was measured", ("", "value"), (*rows, *(("Note", note) for note in result.notes)), numeric=False)


def layer_times(rows: Sequence[Row], kind: Kind) -> str:
    """Bars side by side: each layer's time in every artifact, the network's first layer on top."""
    names = layer_names(rows)
    label = Label("layers", "Time by layer", "Each layer's share of an inference in every artifact, from the runtime's profiler.")
    height = 0.8 / len(rows)
    with plots.new_axes(70.0 + (8.0 + 8.0 * len(rows)) * len(names), plots.NAMED_ROWS) as (figure, axes):
        for number, (row, colour) in enumerate(zip(rows, _COLOURS, strict=False)):
            times = {layer.name: layer.ms for layer in row.layers}
            places = [i + (number - (len(rows) - 1) / 2) * height for i in range(len(names))]
            widths = [times.get(name, 0.0) for name in names]
            axes.barh(places, widths, height=0.9 * height, color=colour, linewidth=0, label=Path(row.name).name)
        axes.set_yticks(range(len(names)), [plots.shortened(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(f"ms in one inference ({kind})", loc="left")
        axes.grid(True, axis="x")
        return plots.to_svg(figure, label, columns=1)
