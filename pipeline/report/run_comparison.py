"""Compares several runs on one page: accuracy against measured latency, the figures side by side, how the plans differ.

Only what can be compared is put together: artifacts measured on the same test images and the same device form a group with a plot
and a table of its own; plans are shown side by side where the dense networks have the same groups of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from ..signature import TOP1, Metric
from ..types import Kind, Timing
from ..verify.statistics import Interval, latency_ci95, share_ci95
from .format import DASH, bare, count, fixed, interval, labelled, millis, render, size, tag
from .plots import pareto
from .plots.svg import Label
from .report import Kept, Report, TargetReport

HEAD = ("median latency, ms", "speedup", "size", "MACs", "parameters", "gates")


@dataclass(frozen=True)
class Entry:
    """One artifact of one run."""

    name: str  # of the run, with the target where a run has several
    report: Report
    target: str

    @property
    def result(self) -> TargetReport:
        """Its entry in the report."""
        return self.report.targets[self.target]


@dataclass(frozen=True)
class Cell:
    """A figure in a table."""

    text: str
    rank: float | None = None  # what it is compared by: lower is better; None where there is nothing to compare
    interval: str = ""  # 95 %
    best: bool = False


@dataclass(frozen=True)
class Group:
    """Artifacts that can be compared: the same test images, the same device."""

    uid: str
    title: str
    short: str  # for the navigation
    head: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    plot: Markup | None
    caption: str


@dataclass(frozen=True)
class Share:
    """What stays of a group of channels, or of a layer's connections, in one run."""

    text: str
    share: float | None  # None: the run has no such group
    differs: bool = False


@dataclass(frozen=True)
class Plans:
    """Plans of networks with the same structure, side by side."""

    title: str
    runs: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Share, ...]], ...]  # name, kind, what stays in each run; only where they differ
    same: int  # rows in which all agree


def to_html(reports: Sequence[tuple[str, Report]]) -> str:
    """The page, from reports alone (name of the run, its report); everything from outside is escaped."""
    entries = _entries(reports)
    return render(
        "run_comparison.html.jinja",
        runs=[name for name, _ in _named(reports)],
        entries=entries,
        groups=groups(entries),
        plans=plans(reports),
        missing=[f"{e.name}: {e.result.why}" for e in entries if e.result.artifact is None],
        failed=[f"{e.name}: {e.result.why}" for e in entries if e.result.artifact and not e.result.verdict.passed],
        passed=sum(e.result.verdict.passed for e in entries),
    )


def groups(entries: Sequence[Entry]) -> tuple[Group, ...]:
    """The artifacts by what they were measured on, in the order they were given."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        if entry.result.artifact is not None:
            found.setdefault(_ground(entry), []).append(entry)
    return tuple(_group(f"group-{number}", ground, members) for number, (ground, members) in enumerate(found.items(), start=1))


def plans(reports: Sequence[tuple[str, Report]]) -> tuple[Plans, ...]:
    """Where the plans of runs on the same dense structure differ, layer by layer."""
    alike: dict[tuple[tuple[str, int], ...], list[tuple[str, Report]]] = {}
    for name, report in _named(reports):
        structure = tuple((knob.name, knob.size) for knob in report.pruned.knobs)
        alike.setdefault(structure, []).append((name, report))
    return tuple(_plans(members) for structure, members in alike.items() if len(members) > 1 and structure)


def _entries(reports: Sequence[tuple[str, Report]]) -> list[Entry]:
    several = any(len(report.targets) > 1 for _, report in reports) or len({t for _, r in reports for t in r.targets}) > 1
    return [
        Entry(f"{name} ({target})" if several else name, report, target)
        for name, report in _named(reports)
        for target in report.targets
    ]


def _named(reports: Sequence[tuple[str, Report]]) -> list[tuple[str, Report]]:
    """Runs by names that differ."""
    seen: dict[str, int] = {}
    found = []
    for name, report in reports:
        seen[name] = seen.get(name, 0) + 1
        found.append((f"{name} #{seen[name]}" if seen[name] > 1 else name, report))
    return found


def _ground(entry: Entry) -> tuple[str, ...]:
    """What figures must have in common to be compared: test images; device, its processor, threads."""
    data, latency = entry.report.data, entry.result.latency
    where = (latency.device, latency.environment.get("cpu", ""), str(latency.threads)) if latency else ("no device", "", "")
    metric = entry.report.metric
    return data.sha256, data.name, *where, metric.name


def _group(uid: str, ground: tuple[str, ...], members: Sequence[Entry]) -> Group:
    _, data, device, cpu, threads, _ = ground
    metric = members[0].report.metric
    lost = "points lost" if metric.unit == "%" else "lost"
    where = ", ".join(
        part for part in (device, cpu, f"{threads} thread{'s' if threads != '1' else ''}" if threads else "") if part
    )
    title = f"{data} on {where}"
    plot, caption = _plot(uid, title, members)
    return Group(uid, title, f"{data} on {device}", (labelled(metric), lost, *HEAD), _rows(members), plot, caption)


def _rows(members: Sequence[Entry]) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    """A row for each artifact. The best of a column is the best of those of the best kind there is; a draw has several."""
    found = [_cells(entry) for entry in members]
    best = [_best(column) for column in zip(*found, strict=True)]
    return tuple(
        (entry.name, tuple(replace(cell, best=i in winners) for cell, winners in zip(cells, best, strict=True)))
        for i, (entry, cells) in enumerate(zip(members, found, strict=True))
    )


def value_ci95(metric: Metric, value: float, samples: int) -> Interval | None:
    """95 % interval of a value; None where the metric is no count of samples."""
    return share_ci95(value, samples) if metric == TOP1 else None


def _best(column: Sequence[Cell]) -> set[int]:
    known = {i: figure.rank for i, figure in enumerate(column) if figure.rank is not None}
    if len(known) < 2 or len(set(known.values())) == 1:
        return set()
    return {i for i, rank in known.items() if rank == min(known.values())}


def _cells(entry: Entry) -> list[Cell]:
    """The figures of an artifact, the metric and its drop, then in the order of `HEAD`; only measured latencies are compared."""
    accuracy, latency, artifact, pruned = entry.result.accuracy, entry.result.latency, entry.result.artifact, entry.report.pruned
    value, drop, median, speedup, file = [Cell(DASH)] * 5
    metric = entry.report.metric
    if accuracy is not None:
        ends = value_ci95(metric, accuracy.value, accuracy.samples)
        rank = -accuracy.value if metric.higher_is_better else accuracy.value
        value = Cell(tag(bare(metric, accuracy.value), accuracy.kind), rank, interval(ends) if ends else "")
        span = interval(accuracy.drop_ci95) if accuracy.drop_ci95 else ""
        drop = Cell(tag(bare(metric, accuracy.drop), accuracy.kind), accuracy.drop, span)
    if latency is not None:
        measured, p50, ratio = latency.kind == Kind.MEASURED, latency.artifact.p50_ms, latency.speedup.median
        ends_ms = _latency_interval(latency, "artifact")
        span = f"{millis(ends_ms[0])} to {millis(ends_ms[1])}" if ends_ms else ""
        median = Cell(tag(millis(p50), latency.kind), p50 if measured else None, span)
        speedup = Cell(tag(f"{fixed(ratio)}×", latency.kind), -ratio if measured else None, interval(latency.speedup.ci95))
    if artifact is not None:
        file = Cell(size(artifact.size_bytes), artifact.size_bytes)
    gates = Cell("passed" if entry.result.verdict.passed else "failed")
    sizes = [Cell(count(pruned.macs), pruned.macs), Cell(count(pruned.params), pruned.params)]
    return [value, drop, median, speedup, file, *sizes, gates]


def _plot(uid: str, title: str, members: Sequence[Entry]) -> tuple[Markup | None, str]:
    """The plot of a group's measured artifacts and their dense baselines, and the sentences under it."""
    dense: dict[str, pareto.Point] = {}  # one for each baseline file, whoever measured it first
    artifacts, left = [], []
    for entry in members:
        accuracy, latency, artifact = entry.result.accuracy, entry.result.latency, entry.result.artifact
        if accuracy is None or latency is None or artifact is None or latency.kind != Kind.MEASURED:
            left.append(f"{entry.name} (latency {latency.kind if latency else Kind.NONE})")
            continue
        metric, count_of = entry.report.metric, accuracy.samples
        shown = value_ci95(metric, accuracy.value, count_of)
        ends = _latency_interval(latency, "artifact")
        artifacts.append(pareto.Point(entry.name, latency.artifact.p50_ms, ends, accuracy.value, shown, artifact.size_bytes))
        if artifact.baseline is not None:  # in the artifact's runtime; its accuracy is PyTorch's on the same images
            whole, named = accuracy.dense_value, entry.report.model.name.rpartition(":")[2]
            point = pareto.Point(
                f"dense {named}, float {artifact.format}",
                latency.dense.p50_ms,
                _latency_interval(latency, "dense"),
                whole,
                value_ci95(metric, whole, count_of),
                artifact.baseline.size_bytes,
                dense=True,
            )
            dense.setdefault(artifact.baseline.sha256, point)
    points = [*dense.values(), *artifacts]
    missing = f" Not drawn, for lack of a measured latency: {', '.join(left)}." if left else ""
    if not points:
        return None, f"Nothing was measured here.{missing}"
    front = [points[i].name for i in pareto.front(points, members[0].report.metric.higher_is_better)]
    caption = (
        "Up and to the left is better; the area is the file's size, the bars are 95 % intervals. On the line, no other point is "
        f"both faster and more accurate: {', '.join(front)}.{missing}"
    )
    label = Label(f"{uid}-plot", f"Accuracy against latency: {title}", caption)
    return Markup(pareto.plot(points, label, members[0].report.metric)), caption  # noqa: S704 - our own SVG


def _latency_interval(latency: Timing, side: str) -> Interval | None:
    return latency_ci95(latency, side) if getattr(latency, f"{side}_samples_ms") else None


def _plans(members: Sequence[tuple[str, Report]]) -> Plans:
    rows, same = [], 0
    for found in zip(*(report.pruned.knobs for _, report in members), strict=True):
        shares = [knob.kept / knob.size for knob in found]
        if len(set(shares)) == 1:
            same += 1
            continue
        usual = max(shares, key=shares.count)
        cells = tuple(Share(_kept(knob), share, share != usual) for knob, share in zip(found, shares, strict=True))
        rows.append((found[0].name, found[0].kind, cells))
    names = tuple(name for name, _ in members)
    models = dict.fromkeys(report.model.name for _, report in members)
    return Plans(", ".join(models), names, tuple(rows), same)


def _kept(knob: Kept) -> str:
    if knob.kind == "block":
        return "kept" if knob.kept else "removed"
    if knob.kind == "layer":
        return f"{100 * knob.kept / knob.size:.0f} %"
    return "removed with its block" if knob.block else f"{knob.kept}/{knob.size}"
