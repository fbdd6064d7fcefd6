"""Compares a run with a stored report: what got worse, and a summary in Markdown for the page of a CI job.

Accuracy got worse when top-1 fell significantly: by an exact sign test over the images that changed, where both reports say which
images are classified correctly; else by more than half the width of the stored interval of the drop (at least that of as many
images of which none changed). The speedup got worse when its whole 95 % interval is below the stored one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..report.format import DASH, fixed, interval, md, points, size, tag
from ..report.report import Report, ReportedArtifact, TargetReport
from ..signature import TOP1, Metric
from ..types import Accuracy, Kind, Timing
from ..verify.gates import unpacked
from ..verify.statistics import paired_ci95, sign_test
from .recheck import differing

_LEVEL = 0.05  # of the sign test, one-sided: only a fall counts


@dataclass(frozen=True)
class Row:
    """One figure, before and now."""

    target: str
    what: str
    before: str
    now: str
    worse: str = ""  # why, one sentence; empty: it is not
    remark: str = ""


def compare(old: Report, new: Report, targets: Sequence[str]) -> tuple[Row, ...]:
    """The figures of some targets in two reports.

    Raises:
        InputError: the reports are of other data or another metric, or the stored one has none of the targets.
    """
    if old.metric != new.metric:
        what, expected = "--against: the stored report is of another metric", _named(new.metric)
        raise InputError(what, found=_named(old.metric), expected=expected, do="store a report of this run")
    if old.data.sha256 != new.data.sha256:
        raise InputError(
            "--against: the stored report is of other data", found=old.data.name, expected=f"{new.data.name}, unchanged"
        )
    if not set(targets) & set(old.targets):
        raise InputError(
            "--against: the stored report has none of these targets",
            found=", ".join(old.targets),
            expected=" or ".join(targets),
        )
    rows: list[Row] = []
    for name in targets:
        now = new.targets[name]
        if name not in old.targets:
            rows.append(Row(name, "target", DASH, now.status, remark="not in the stored report"))
            continue
        before = old.targets[name]
        rows += [_gates(name, before, now), _accuracy(new.metric, name, before.accuracy, now.accuracy)]
        rows += [_speedup(name, before.latency, now.latency), _size(name, before.artifact, now.artifact)]
    return tuple(rows)


def _named(metric: Metric) -> str:
    better = "higher" if metric.higher_is_better else "lower"
    return f"{metric.name}{f' in {metric.unit}' if metric.unit else ''}, {better} is better"


def to_markdown(rows: Sequence[Row], checks: Sequence[tuple[str, bool]], title: str) -> str:
    """The summary: the verdict as a heading, the figures as a table, what was checked as a list."""
    worse = [f"{row.target}: {row.worse}" for row in rows if row.worse]
    broken = [text for text, holds in checks if not holds]
    verdict = "got worse" if worse else "does not hold" if broken else "no worse than before"
    lines = [f"## edge-compress: {md(title)} {verdict}", ""]
    lines += [f"- **{md(text)}**" for text in (*worse, *broken)] + [""] * bool(worse or broken)
    lines += ["| target | figure | stored | now | |", "| --- | --- | --: | --: | --- |"]
    for row in rows:
        mark = "worse" if row.worse else row.remark
        lines.append("| " + " | ".join(md(cell) for cell in (row.target, row.what, row.before, row.now, mark)) + " |")
    lines += ["", *(f"- {md(text)}" for text, holds in checks if holds)]
    return "\n".join(lines)


def _gates(name: str, before: TargetReport, now: TargetReport) -> Row:
    said = {True: "passed", False: "failed"}
    why = f"gates: {now.why}" if before.verdict.passed and not now.verdict.passed else ""
    return Row(name, "gates", said[before.verdict.passed], said[now.verdict.passed], why)


def _accuracy(metric: Metric, name: str, before: Accuracy | None, now: Accuracy | None) -> Row:
    shown, shown_now = (DASH if a is None else tag(metric.shown(a.value), a.kind) for a in (before, now))
    worse = remark = ""
    if before is None:
        remark = "none was stored"
    elif now is None:
        worse = "accuracy: it is no longer known"
    else:
        worse = _fell(metric, before, now)
    return Row(name, metric.name, shown, shown_now, worse, remark)


def _fell(metric: Metric, before: Accuracy, now: Accuracy) -> str:
    """Why accuracy got worse, in a sentence; empty where it did not."""
    if not math.isfinite(now.value) and math.isfinite(before.value):
        return f"accuracy: {metric.name} is NaN now"
    fell = metric.drop(before.value, now.value)
    if fell <= 0:
        return ""
    then, today = (_images(metric, accuracy) for accuracy in (before, now))
    if then is not None and today is not None and len(then) == len(today):
        lost, won = int((then & ~today).sum()), int((today & ~then).sum())
        chance = sign_test(lost, won) / 2
        told = f"{lost} images are lost and {won} won, by chance with p = {chance:.2g}"
        return f"accuracy: {metric.name} fell by {points(metric, fell)}: {told}" if chance < _LEVEL else ""
    low, high = before.drop_ci95 or (0.0, 0.0)
    least = paired_ci95(0, 0, before.samples)[1] if metric == TOP1 else 0.0
    allowed = max((high - low) / 2, least)
    within = f"{fixed(allowed)} are within the stored interval"
    return f"accuracy: {metric.name} fell by {points(metric, fell)}, {within}" if fell > allowed + 1e-9 else ""


def _images(metric: Metric, accuracy: Accuracy) -> NDArray[np.bool_] | None:
    """Which images are classified correctly; None where that is not known, or does not fit the figures."""
    try:
        return unpacked(accuracy, metric)
    except ValueError:
        return None


def _speedup(name: str, before: Timing | None, now: Timing | None) -> Row:
    shown, shown_now = _interval(before), _interval(now)
    worse = remark = ""
    if before is None:
        remark = "none was stored"
    elif now is None or now.kind != before.kind:
        worse = f"speedup: it was {before.kind}, now it is {now.kind if now else Kind.NONE}"
    else:
        other = differing(before, now)
        remark = f"another {' and '.join(other)}" if other else ""
        if now.speedup.ci95[1] < before.speedup.ci95[0]:
            worse = f"speedup: its whole interval {shown_now} lies below the stored {shown}"
            worse += f" ({remark})" if remark else ""
    return Row(name, "speedup (95 % interval)", shown, shown_now, worse, remark)


def _interval(latency: Timing | None) -> str:
    if latency is None:
        return DASH
    return tag(f"{fixed(latency.speedup.median)} ({interval(latency.speedup.ci95)})", latency.kind)


def _size(name: str, before: ReportedArtifact | None, now: ReportedArtifact | None) -> Row:
    return Row(name, "size", *(DASH if a is None else size(a.size_bytes) for a in (before, now)))
