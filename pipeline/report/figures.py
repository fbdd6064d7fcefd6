"""The plots of a report, with the sentences under them and their numbers as tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from ..signature import TOP1
from ..types import Kind, Speedup
from ..verify.by_class import worst
from .format import DASH, Table, bare, count, fixed, interval, labelled, millis, percent, points, seconds, size, tag
from .front import FrontPoint, breaks_a_gate
from .plots import pareto
from .plots import svg as plots
from .report import Report, Search, TargetReport, Tried

_WORST = 5  # classes
_LONGEST = 8  # layers
_LARGEST = 5  # removals
_NUMBER = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?")
_SHOWN = 1200  # candidates drawn and listed at most; report.json has all of them


@dataclass(frozen=True)
class Plot:
    """A plot, the sentence under it and its numbers as a table."""

    uid: str
    title: str
    caption: str
    svg: Markup
    table: Table
    rows: int = 1  # how many rows of plots it is as high as, side by side


def _plot(uid: str, title: str, caption: str, table: Table, draw: Callable[[plots.Label], str], rows: int = 1) -> Plot:
    return Plot(uid, title, caption, Markup(draw(plots.Label(uid, title, caption))), table, rows)  # noqa: S704 - our own SVG


def figures(report: Report) -> tuple[Plot, ...]:
    """The plots that the report has numbers for, in the order people look for them."""
    found = [_front_plot(report, i, name) for i, name in enumerate(report.targets)]
    found += [_tradeoff_plot(report), _kept_plot(report), _learning_plot(report)]
    found += [_latency_plot(report, i, name) for i, name in enumerate(report.targets)]
    return tuple(p for p in [*found, _finetune_plot(report)] if p is not None)


def _front_plot(report: Report, index: int, name: str) -> Plot | None:
    """The artifacts of several budgets, the dense network in float, and quantised."""
    target, dense = report.targets[name], report.dense.value
    drawn = [p for p in report.front if p.target == name and p.speedup and p.value is not None and p.size_bytes]
    if not drawn or target.artifact is None:
        return None
    size_bytes = target.artifact.baseline.size_bytes if target.artifact.baseline else report.dense.size_bytes
    shown = [pareto.Point("dense, float", 1.0, None, dense, None, size_bytes, dense=True)]
    if (alone := target.alone) is not None and alone.speedup:
        where = alone.speedup.inverted()
        whole = pareto.Point(
            f"dense, {alone.precision}", where.median, where.ci95, alone.value, None, alone.size_bytes, dense=True
        )
        shown.append(whole)
    for p in drawn:
        assert p.speedup is not None
        assert p.value is not None
        assert p.size_bytes is not None
        where, named = p.speedup.inverted(), f"budget {p.budget}{_marked(report, p)}"
        shown.append(pareto.Point(named, where.median, where.ci95, p.value, None, p.size_bytes, failed=not p.passed))
    caption = (
        "Up and to the left is better. Each latency is measured in turns with the dense float network's, and is a share of it; "
        "bars are 95 % intervals, the area is the file's size; a hollow mark failed a gate."
    )
    title = f"Several budgets on {name}: {report.metric.name} against latency"

    def draw(label: plots.Label) -> str:
        return pareto.plot(shown, label, report.metric, "latency, share of the dense float network's (measured)")

    return _plot(f"front-{index}", title, caption, front_table(report, name), draw)


def front_table(report: Report, name: str) -> Table:
    """What each budget's network is worth on a target, and how fast it is; first the dense network, in float and quantised."""
    head = ("Budget", labelled(report.metric), "lost", "speedup over float", "over quantising alone", "size", "gates", "run")
    rows = tuple(
        (
            f"{p.budget}{_marked(report, p)}",
            tag(bare(report.metric, p.value), p.kind),
            DASH if p.drop is None else tag(points(report.metric, p.drop), p.kind),
            _ratio(p.speedup) + (f" ({', '.join(p.quality)})" if p.quality else ""),
            _ratio(p.gain if report.targets[name].alone else None),  # older runs compared float with itself
            DASH if p.size_bytes is None else size(p.size_bytes),
            "passed" if p.passed else "failed",
            p.run,
        )
        for p in report.front
        if p.target == name
    )
    return Table(f"Budgets on {name}", head, (*_dense_rows(report, report.targets[name]), *rows) if rows else ())


def _dense_rows(report: Report, target: TargetReport) -> Iterator[tuple[str, ...]]:
    """The dense network in a target's format: in float, and quantised."""
    baseline, alone = target.artifact.baseline if target.artifact else None, target.alone
    size_bytes = size(baseline.size_bytes) if baseline else DASH
    yield "dense, float", bare(report.metric, report.dense.value), DASH, DASH, DASH, size_bytes, DASH, DASH
    if alone is not None:
        value, lost = tag(bare(report.metric, alone.value), alone.kind), report.metric.drop(report.dense.value, alone.value)
        drop, size_bytes = tag(points(report.metric, lost), alone.kind), size(alone.size_bytes)
        yield f"dense, {alone.precision}", value, drop, _ratio(alone.speedup), DASH, size_bytes, DASH, DASH


def _marked(report: Report, point: FrontPoint) -> str:
    """The run's own network among those of all budgets: the fastest that breaks no gate, if one does, on any target."""
    sound = not any(breaks_a_gate(target, report) for target in report.targets.values())
    return "" if not point.taken else " (fastest that passes)" if sound else " (taken: none passes)"


def layer_table(report: Report, name: str) -> Table:
    """The layers of the artifact that take longest; empty where the runtime has no profiler."""
    target = report.targets[name]
    layers = sorted(target.usage.layers if target.usage else (), key=lambda layer: -layer.ms)
    total, kind = sum(layer.ms for layer in layers), target.latency.kind if target.latency else Kind.NONE
    total = total or math.inf  # an older run, or a file from elsewhere: nothing took any time
    rows = [(layer.name, layer.kind, tag(millis(layer.ms), kind), fixed(100 * layer.ms / total)) for layer in layers[:_LONGEST]]
    if rest := layers[_LONGEST:]:
        ms = sum(layer.ms for layer in rest)
        rows.append((f"{len(rest)} others", DASH, tag(millis(ms), kind), fixed(100 * ms / total)))
    return Table(f"Layers of {name}'s artifact that take longest", ("Layer", "operator", tag("ms", kind), "%"), tuple(rows))


def class_table(report: Report, name: str) -> Table:
    """The classes that lost most; none for other networks than classifiers."""
    accuracy = report.targets[name].accuracy
    classes = accuracy.classes if accuracy else {}
    rows = []
    for label, lost, ends in worst(classes)[:_WORST]:
        samples, dense, artifact, _ = classes[label]
        rows.append((label, str(samples), str(dense), str(artifact), fixed(lost), interval(ends)))
    head = ("Class", "test samples", "right, dense", "right, artifact", "points lost", "95 % interval")
    return Table(f"Classes that lost most on {name}", head, tuple(rows))


def confusion_table(report: Report, name: str) -> Table:
    """The confusions of a classifier that rose most."""
    accuracy = report.targets[name].accuracy
    rows = tuple((f"{a} as {b}", str(before), str(after)) for a, b, before, after in (accuracy.confused if accuracy else ()))
    return Table(f"Confusions that rose most on {name}", ("Class as another", "dense", "artifact"), rows)


def protocol_table(report: Report, name: str) -> Table:
    """The settings and the state of the device that the latencies were measured with, by their keys in report.json."""
    latency = report.targets[name].latency
    pairs = sorted(latency.environment.items()) if latency else ()
    rows = tuple((k, tag(v, latency.kind) if latency and _NUMBER.fullmatch(v) else v) for k, v in pairs)
    return Table(f"{name}: settings of the measurement", ("", "value"), rows, numeric=False)


def removed_table(report: Report) -> Table:
    """The removals that save most latency, with the reason: what each saves, and how little of its group's score it had."""
    gone = [k for k in report.pruned.knobs if k.kept < k.size and k.saved is not None and k.saved > 0 and not k.block]
    gone.sort(key=lambda k: -(k.saved or 0.0))
    rows = tuple(
        (
            k.name,
            "the whole block" if k.kind == "block" else f"{k.size - k.kept} of {k.size}",
            percent(k.saved),
            percent(k.score),
        )
        for k in gone[:_LARGEST]
    )
    saves = tag("dense latency that this alone saves, %", Kind.ESTIMATED)  # an entry of the table, which alike groups share
    head = ("Group", "units removed", saves, "share of the group's score removed, %")
    return Table(f"The {len(rows)} removals that save most, of {len(gone)}", head, rows)


def _ratio(speedup: Speedup | None) -> str:
    return DASH if speedup is None else f"{fixed(speedup.median)}× ({interval(speedup.ci95)})"


def _tradeoff_plot(report: Report) -> Plot | None:
    search, spending = report.pruned.search, "density" if report.masked else "latency"
    shown = _shown(search)
    tried = [p for i in shown if (p := _point(search.tried[i])) is not None]
    chosen = _point(search.best)
    if not tried and chosen is None:
        return None
    top1 = report.metric == TOP1
    whole = report.dense.search_value if top1 else 100.0
    dense = plots.Point(1.0, whole, Kind.MEASURED) if whole is not None else None
    quality = "top-1, %" if top1 else f"{report.metric.name}, % of the dense network's"
    caption = "No candidate was chosen."
    if chosen is not None:
        of = "" if top1 else f" of the dense network's {report.metric.name}"
        latency = tag(f"{fixed(search.best.latency_ratio)} of the dense latency", chosen.kind)
        what = latency if spending == "latency" else f"{percent(chosen.spent)} % of the connections"
        caption = (
            f"Chosen: {what} at {fixed(chosen.accuracy)} %{of} before fine-tuning; {len(search.tried):,} evaluations in all."
        )
        if spending == "density":
            caption += f" Zeros give no speedup: every candidate has {latency}."
    kinds = [k for k in Kind if k is not Kind.NONE and any(c.latency_kind == k for c in search.tried)]
    rows = []
    for i in shown:
        c = search.tried[i]
        columns = [percent(c.density)] if spending == "density" else []
        columns += [tag(fixed(c.latency_ratio, 3), k) if c.latency_kind == k else DASH for k in kinds]
        mark = " (chosen)" if i == search.best_index else ""
        rows.append((f"{i + 1}{mark}", *columns, percent(c.accuracy), fixed(c.loss, 3), count(c.macs)))
    stay = ("connections, %",) if spending == "density" else ()
    head = ("Evaluation", *stay, *(f"latency ratio ({k})" for k in kinds), quality, "loss", "MACs")
    title = "Accuracy against latency" if spending == "latency" else "Accuracy against connections kept"
    label = plots.Label("tradeoff", title, f"Every candidate the search tried. {caption}")
    table = Table(_thinned("Candidates tried", shown, search), head, tuple(rows))
    budget = report.gates.density_budget if spending == "density" else report.gates.latency_budget
    svg = Markup(plots.tradeoff(tried, chosen, dense, budget or 0.0, label, spending, quality))  # noqa: S704
    return Plot("tradeoff", title, caption, svg, table)


def _kept_plot(report: Report) -> Plot | None:
    knobs = report.pruned.knobs
    if not knobs:
        return None
    told = {k.block for k in knobs if k.block}  # blocks that show on the bars of what was in them
    bars = [k for k in knobs if k.kind != "block" or (k.kept == 0 and k.name not in told)]
    blocks = [k for k in knobs if k.kind == "block"]
    removed = sum(k.kept == 0 for k in blocks)
    units = "layer's connections" if report.masked else "group's channels"
    caption = f"Share of each {units} that stays, first layer on top."
    if blocks:
        caption += f" {removed} of {len(blocks)} residual blocks removed."
    title = "What is kept, layer by layer"
    return _plot("kept", title, caption, kept_table(report), partial(plots.kept_shares, bars), rows=1 + len(bars) // 24)


def _learning_plot(report: Report) -> Plot | None:
    search = report.pruned.search
    rewards = [c.reward for c in search.tried]
    if not rewards:
        return None
    shown, best = _shown(search), plots.best_so_far(rewards)
    rows = tuple((str(i + 1), fixed(rewards[i], 4), fixed(best[i], 4)) for i in shown)
    top = next((i for i, b in enumerate(best) if b == best[-1]), 0)
    caption = f"The best reward, {fixed(best[-1], 4)}, was found at evaluation {top + 1:,} of {len(rewards):,} ({search.method})."
    title = "The search's learning curve"
    table = Table(_thinned("Reward by evaluation", shown, search), ("Evaluation", "reward", "best so far"), rows)
    return _plot("learning", title, caption, table, partial(plots.learning_curve, rewards, shown))


def _latency_plot(report: Report, index: int, name: str) -> Plot | None:
    latency = report.targets[name].latency
    if latency is None or not latency.dense_samples_ms or not latency.artifact_samples_ms:
        return None
    kind, samples_ms = latency.kind, (latency.dense_samples_ms, latency.artifact_samples_ms)
    end = plots.axis_end(latency)
    beyond = sum(v > end for values in samples_ms for v in values)
    rows = tuple(
        (f"{100 * q:g} %", *(tag(millis(_quantile(values, q)), kind) for values in samples_ms))
        for q in (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
    )
    counts = " and ".join(str(len(values)) for values in samples_ms)
    caption = f"On {latency.device}, {kind}; {counts} samples, {beyond} beyond the axis. Vertical lines: medians of all samples."
    title = f"Latency on {name}, dense against artifact"
    table = Table("Quantiles of the samples drawn", ("Quantile", tag("dense, ms", kind), tag("artifact, ms", kind)), rows)
    return _plot(f"latency-{index}", title, caption, table, partial(plots.latency_histogram, latency))


def _finetune_plot(report: Report) -> Plot | None:
    history = report.pruned.finetune
    if not history:
        return None
    first, last = (report.metric.shown(history[k].search_value) for k in (0, -1))
    caption = f"From {first} after the first epoch to {last} after the last of {len(history)}."
    draw = partial(plots.finetuning, history, report.dense.search_value, report.metric)
    return _plot("finetune", "Fine-tuning", caption, finetune_table(report), draw)


def _point(candidate: Tried) -> plots.Point | None:
    ratio, accuracy = candidate.latency_ratio, candidate.accuracy
    if ratio is None or accuracy is None:
        return None
    return plots.Point(ratio if candidate.density is None else candidate.density, 100.0 * accuracy, candidate.latency_kind)


def _shown(search: Search) -> list[int]:
    """Indices of the candidates to draw and list: all, or evenly spaced ones and always the chosen and the best."""
    count = len(search.tried)
    if count <= _SHOWN:
        return list(range(count))
    rewards = [-math.inf if c.reward is None else c.reward for c in search.tried]
    always = {rewards.index(max(rewards)), count - 1} | (set() if search.best_index is None else {search.best_index})
    return sorted({round(i * (count - 1) / (_SHOWN - 1)) for i in range(_SHOWN)} | always)


def _thinned(caption: str, shown: Sequence[int], search: Search) -> str:
    count = len(search.tried)
    return caption if len(shown) == count else f"{caption}: {len(shown):,} of {count:,}, evenly spaced; report.json has all"


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


def kept_table(report: Report) -> Table:
    """What stays of every group of channels, or of every layer's connections."""
    rows = tuple(
        (k.name, "removed with its block" if k.block else k.kind, str(k.size), str(k.kept), f"{100 * k.share:.0f}")
        for k in report.pruned.knobs
    )
    if report.masked:
        return Table("Kept connections per layer", ("Layer", "kind", "dense", "kept", "kept, %"), rows)
    return Table("Kept units per group", ("Group", "kind", "dense", "kept", "kept, %"), rows)


def finetune_table(report: Report) -> Table:
    """The fine-tuning history."""
    rows = tuple(
        (str(e.epoch), fixed(e.loss, 4), bare(report.metric, e.search_value), seconds(e.seconds)) for e in report.pruned.finetune
    )
    return Table("Fine-tuning by epoch", ("Epoch", "loss", labelled(report.metric, " on the search split"), "time"), rows)
