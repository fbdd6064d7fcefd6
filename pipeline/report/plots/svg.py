"""The report's plots as inline SVG: same data, same bytes.

Text stays text and every colour is a CSS variable of the page (with a fallback), so a plot is small, can be searched and
follows light and dark. Ids are prefixed, so that several plots fit into one page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ...signature import Metric
from ...types import Epoch, Kind, Timing
from ..format import labelled
from ..report import Kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Sentinels: matplotlib needs real colours, the page wants its own. Blue and vermilion are Okabe and Ito's, told apart by
# colour-blind readers too.
INK, MUTED, BLUE, RED, GREEN = "#010101", "#010102", "#010103", "#010104", "#010105"
_PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--plot-muted,#7a828c)",
    BLUE: "var(--plot-blue,#0072b2)",
    RED: "var(--plot-red,#d55e00)",
    GREEN: "var(--plot-green,#009e73)",
}
_WIDTH = 360.0  # SVG units; small on purpose: a phone shows it at about this size and the text stays readable
_SPENDING = {"latency": "latency, share of the dense float model's", "density": "connections that stay, share of all"}
_MARKERS = {Kind.MEASURED: "o", Kind.EMULATED: "s", Kind.ESTIMATED: "^"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "edge-compress",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer name with a dollar sign is a name
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout on every machine
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
    "legend.borderpad": 0.2,
    "hatch.color": RED,
    "hatch.linewidth": 0.5,
}
# for axes whose rows have names
NAMED_ROWS: dict[Any, Any] = {
    "ytick.labelsize": 9.5,
    "ytick.major.size": 0,
    "axes.spines.left": False,
}


@dataclass(frozen=True)
class Label:
    """How a plot is named in the page and read aloud."""

    uid: str  # prefix of every id in the SVG, unique in the page: [a-z0-9-]+
    title: str
    description: str  # what the plot shows, in a sentence


@dataclass(frozen=True)
class Point:
    """One candidate of the search."""

    spent: float  # share of the dense model's latency, or of its connections
    accuracy: float  # percent
    kind: Kind  # of the latency


def tradeoff(
    points: Sequence[Point],
    chosen: Point | None,
    dense: Point | None,
    budget: float,
    label: Label,
    spending: str = "latency",
    quality: str = "top-1, %",
) -> str:
    """Accuracy against latency (or, `spending` "density", connections kept): every candidate, the budget, the chosen one.

    `points` and `chosen` of kind `none` are left out: they have no place on the axis.
    """
    shown = [p for p in points if p.kind is not Kind.NONE]

    def named(what: str, kind: Kind) -> str:
        return f"{what} ({kind})" if spending == "latency" else what  # connections are counted

    with new_axes(265) as (figure, axes):
        for kind, marker in _MARKERS.items():
            mine = [p for p in shown if p.kind is kind]
            if mine:
                xs, ys = [p.spent for p in mine], [p.accuracy for p in mine]
                axes.plot(xs, ys, marker, color=BLUE, alpha=0.45, ms=4, mew=0, label=named("candidate", kind))
        axes.axvline(budget, color=MUTED, lw=1.2, ls=(0, (4, 3)), label=f"budget {budget:.2f}")
        if dense is not None:
            axes.plot([dense.spent], [dense.accuracy], "P", color=MUTED, ms=7, mew=0, label="dense float")
        if chosen is not None and chosen.kind is not Kind.NONE:
            name = named("chosen", chosen.kind)
            axes.plot([chosen.spent], [chosen.accuracy], "D", color=RED, ms=7, mec=INK, mew=0.8, label=name)
        axes.set_xlabel(_SPENDING[spending])
        axes.set_ylabel(f"before fine-tuning: {quality}")
        axes.grid(True)
        axes.margins(0.06)
        return to_svg(figure, label)


def kept_shares(knobs: Sequence[Kept], label: Label) -> str:
    """One bar per group: the share of its units that stays. A group of which nothing stays is hatched: its block is removed."""
    legend = {"channel": "channels within a block", "stream": "shortcut-coupled channels", "layer": "connections"}
    with new_axes(64.0 + 14.5 * len(knobs), NAMED_ROWS) as (figure, axes):
        for kind, meaning in legend.items():
            if any(k.kind == kind and k.kept for k in knobs):
                axes.barh([0], [0], color=GREEN if kind == "stream" else BLUE, label=meaning)
        for row, knob in enumerate(knobs):
            if not knob.kept:
                axes.barh(row, 1.0, height=0.7, facecolor="none", edgecolor=RED, linewidth=0.8, hatch="////", alpha=0.6)
                axes.text(1.03, row, "block removed", va="center", ha="left", fontsize=9, color=RED)
            else:
                axes.barh(row, 1.0, height=0.7, color=MUTED, alpha=0.18, linewidth=0)
                axes.barh(row, knob.kept / knob.size, height=0.7, color=GREEN if knob.kind == "stream" else BLUE, linewidth=0)
                kept = f"{100 * knob.kept / knob.size:.0f} %" if knob.kind == "layer" else f"{knob.kept}/{knob.size}"
                axes.text(1.03, row, kept, va="center", ha="left", fontsize=9, color=INK)
        axes.set_yticks(range(len(knobs)), [shortened(k.name.removeprefix("block:")) for k in knobs])
        axes.set_ylim(len(knobs) - 0.4, -0.6)  # the network's first layer on top
        axes.set_xlim(0, 1.3)
        axes.set_xticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
        axes.set_xlabel("kept share", loc="left")
        return to_svg(figure, label)


def learning_curve(rewards: Sequence[float | None], positions: Sequence[int], label: Label) -> str:
    """Reward of every evaluation, and the best so far. `None` is an evaluation without a reward.

    Rewards far under all others (candidates over the budget) would flatten the curve: see `reward_floor`. They are drawn as
    triangles on the lower edge. Drawn are the evaluations at `positions`; the best so far counts all.
    """
    best = best_so_far(rewards)
    values = np.array([r for r in rewards if r is not None], dtype=np.float64)
    with new_axes(265) as (figure, axes):
        drawn = [(i + 1, r) for i in positions if (r := rewards[i]) is not None]
        if values.size:
            floor = reward_floor(values.tolist())
            span = float(values.max()) - floor
            inside = [(i, r) for i, r in drawn if r >= floor]
            outside = [i for i, r in drawn if r < floor]
            axes.plot([i for i, _ in inside], [r for _, r in inside], "o", color=BLUE, alpha=0.45, ms=4, mew=0, label="reward")
            if outside:
                edge = floor - 0.05 * span
                axes.plot(outside, [edge] * len(outside), "v", color=BLUE, alpha=0.6, ms=5, mew=0, label="far lower")
            steps = [(i + 1, b) for i, b in enumerate(best) if b is not None and b >= floor]
            turns = [s for k, s in enumerate(steps) if k in (0, len(steps) - 1) or s[1] != steps[k - 1][1]]
            xs, ys = [i for i, _ in turns], [b for _, b in turns]
            axes.step(xs, ys, where="post", color=RED, lw=1.8, label="best so far")
        axes.set_xlabel("evaluation")
        axes.set_ylabel("reward")
        axes.locator_params(axis="x", integer=True)
        axes.grid(True)
        axes.margins(0.04, 0.08)
        return to_svg(figure, label)


def latency_histogram(latency: Timing, label: Label) -> str:
    """Latency samples of the dense model and the artifact over the same bins, with their medians; the axis ends at `axis_end`."""
    sides = (("dense", latency.dense_samples_ms, latency.dense), ("artifact", latency.artifact_samples_ms, latency.artifact))
    start, end = min(*latency.dense_samples_ms, *latency.artifact_samples_ms), axis_end(latency)
    edges = np.linspace(start, end if end > start else start + 1e-3, 49)
    with new_axes(265) as (figure, axes):
        for (name, samples_ms, whole), colour in zip(sides, (MUTED, BLUE), strict=True):
            counts, _ = np.histogram(samples_ms, bins=edges)
            text = f"{name}: median {whole.p50_ms:.3g} ms ({latency.kind})"
            axes.stairs(100.0 * counts / len(samples_ms), edges, fill=True, color=colour, alpha=0.45, label=text)
            axes.axvline(whole.p50_ms, color=colour, lw=1.6)
        axes.set_xlabel(f"latency of one inference, ms ({latency.kind})")
        axes.set_ylabel("share of samples, %")
        axes.grid(True, axis="y")
        axes.set_ylim(bottom=0)
        return to_svg(figure, label, columns=1)


def finetuning(history: Sequence[Epoch], dense: float | None, metric: Metric, label: Label) -> str:
    """The metric on the search split after each epoch of fine-tuning, with the dense model's as a line."""
    epochs, values = [e.epoch for e in history], [e.search_value for e in history]
    with new_axes(265) as (figure, axes):
        axes.plot(epochs, values, "-o", color=BLUE, lw=1.8, ms=4, mew=0, label="pruned")
        if dense is not None:
            axes.axhline(dense, color=MUTED, lw=1.2, ls=(0, (4, 3)), label=f"dense {metric.shown(dense)}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(labelled(metric, " on the search split"))
        axes.locator_params(axis="x", integer=True)
        axes.grid(True)
        axes.margins(0.04, 0.1)
        return to_svg(figure, label)


def best_so_far(rewards: Sequence[float | None]) -> list[float | None]:
    """The highest reward up to and with each evaluation; `None` before the first one."""
    best: list[float | None] = []
    for reward in rewards:
        last = best[-1] if best else None
        best.append(last if reward is None else reward if last is None else max(last, reward))
    return best


def reward_floor(rewards: Sequence[float]) -> float:
    """The lowest reward that the learning curve's axis shows.

    The lowest of all, or the lowest above the widest gap between neighbouring rewards, where that gap is wider than the range
    of the rewards above it and at least a fifth of all rewards are above it.
    """
    rising = np.sort(np.asarray(rewards, dtype=np.float64))
    gaps = np.diff(rising[: rising.size - max(rising.size // 5, 4) + 1])
    if gaps.size == 0:
        return float(rising[0])
    after = int(gaps.argmax()) + 1
    return float(rising[after] if gaps[after - 1] > rising[-1] - rising[after] else rising[0])


def axis_end(latency: Timing) -> float:
    """Where the latency axis ends, ms: the slower one's 99 % quantile."""
    return max(float(np.quantile(samples, 0.99)) for samples in (latency.dense_samples_ms, latency.artifact_samples_ms))


@contextmanager
def new_axes(height: float, style: Mapping[Any, Any] | None = None) -> Iterator[tuple[Figure, Axes]]:
    """A figure of the plots' width and a height in SVG units, with its axes; the plots' style holds inside."""
    from matplotlib import rc_context  # takes a second, which a run that is not at its end yet need not wait
    from matplotlib.figure import Figure

    with rc_context({**STYLE, **(style or {})}):
        figure = Figure(figsize=(_WIDTH / 72.0, height / 72.0), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.tick_params(length=3)
        yield figure, axes


def shortened(name: str, limit: int = 24) -> str:
    """The end of a name that is too long for an axis."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


def to_svg(figure: Figure, label: Label, columns: int = 2) -> str:
    """The figure as inline SVG in the page's own font and colours, with a legend above the axes where anything is labelled."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper left", ncols=columns)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The layout's font only measures the text; the browser's own has the glyphs of other scripts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    # The page's own rules hold for the page: matplotlib's style sheet would reach every element of it.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\sid="|\shref="#|url\(#)', rf"\g<1>{label.uid}-", body.replace("xlink:href", "href"))
    body = re.sub(r"font(-family)?:[^;\"]*'DejaVu Sans'[^;\"]*", _page_font, body)
    for sentinel, colour in _PAGE_COLOURS.items():
        body = body.replace(sentinel, colour)
    body = re.sub(r"\s*\n\s*", "\n", body)
    width, height = figure.get_size_inches() * 72.0
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {math.ceil(width)} {math.ceil(height)}" role="img"'
        f' aria-labelledby="{label.uid}-title {label.uid}-desc" style="stroke-linejoin:round">'
        f'<title id="{label.uid}-title">{escape(label.title)}</title>'
        f'<desc id="{label.uid}-desc">{escape(label.description)}</desc>'
    )
    return head + body


def _page_font(found: re.Match[str]) -> str:
    """The page's font in place of matplotlib's, at the same size."""
    size = re.search(r"([\d.]+)px", found.group(0))
    return f"font-size:{size.group(1)}px" if size else "font-family:inherit"
