"""A run against a stored report: what got worse, and a summary in Markdown for the page of a CI job.

Accuracy got worse when top-1 fell by more than the test images can tell: half the width of the stored interval of the drop, which
is paired over the same images. The speedup got worse when its whole 95 % interval lies below the stored one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..report.markdown import md
from ..report.words import DASH, Json, fixed, size, tag
from ..types import Kind
from .recheck import differing


@dataclass(frozen=True)
class Row:
    """One figure, before and now."""

    target: str
    what: str
    before: str
    now: str
    worse: str = ""  # why, one sentence; empty: it is not
    remark: str = ""


def compare(old: Json, new: Json, targets: Sequence[str]) -> tuple[Row, ...]:
    """The figures of some targets in two reports.

    Raises:
        InputError: the reports are of other data, or the stored one has none of the targets.
    """
    if old["data"]["sha256"] != new["data"]["sha256"]:
        raise InputError(
            "--against: the stored report is of other data",
            found=old["data"]["name"],
            expected=f"{new['data']['name']}, unchanged",
        )
    if not set(targets) & set(old["targets"]):
        raise InputError(
            "--against: the stored report has none of these targets",
            found=", ".join(old["targets"]),
            expected=" or ".join(targets),
        )
    rows: list[Row] = []
    for name in targets:
        now = new["targets"][name]
        if name not in old["targets"]:
            rows.append(Row(name, "target", DASH, now["status"], remark="not in the stored report"))
            continue
        before = old["targets"][name]
        rows += [_gates(name, before, now), _accuracy(name, before["accuracy"], now["accuracy"])]
        rows += [_speedup(name, before["latency"], now["latency"]), _size(name, before["artifact"], now["artifact"])]
    return tuple(rows)


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


def _gates(name: str, before: Json, now: Json) -> Row:
    said = {True: "passed", False: "failed"}
    lost = before["verdict"]["passed"] and not now["verdict"]["passed"]
    why = f"gates: {'; '.join(now['verdict']['reasons']) or now['status']}" if lost else ""
    return Row(name, "gates", said[before["verdict"]["passed"]], said[now["verdict"]["passed"]], why)


def _accuracy(name: str, before: Json, now: Json) -> Row:
    shown, shown_now = (DASH if a["kind"] == Kind.NONE else tag(f"{fixed(a['top1'])} %", a["kind"]) for a in (before, now))
    worse = remark = ""
    if before["kind"] == Kind.NONE:
        remark = "none was stored"
    elif now["kind"] == Kind.NONE:
        worse = "accuracy: it is not known any more"
    else:
        allowed = (before["drop_ci95_pp"][1] - before["drop_ci95_pp"][0]) / 2
        fell = before["top1"] - now["top1"]
        if fell > allowed + 1e-9:
            worse = f"accuracy: top-1 fell by {fixed(fell)} points, {fixed(allowed)} are within the stored interval"
    return Row(name, "top-1", shown, shown_now, worse, remark)


def _speedup(name: str, before: Json, now: Json) -> Row:
    shown, shown_now = _interval(before), _interval(now)
    worse = remark = ""
    if before["kind"] == Kind.NONE:
        remark = "none was stored"
    elif now["kind"] != before["kind"]:
        worse = f"speedup: it was {before['kind']}, now it is {now['kind']}"
    else:
        other = differing(before, now)
        remark = f"another {' and '.join(other)}" if other else ""
        if now["speedup"]["ci95"][1] < before["speedup"]["ci95"][0]:
            worse = f"speedup: its whole interval {shown_now} lies below the stored {shown}"
            worse += f" ({remark})" if remark else ""
    return Row(name, "speedup (95 % interval)", shown, shown_now, worse, remark)


def _interval(latency: Json) -> str:
    if latency["kind"] == Kind.NONE:
        return DASH
    speedup = latency["speedup"]
    low, high = speedup["ci95"]
    return tag(f"{fixed(speedup['median'])} ({fixed(low)} to {fixed(high)})", latency["kind"])


def _size(name: str, before: Json | None, now: Json | None) -> Row:
    return Row(name, "size", *(DASH if a is None else size(a["size_bytes"]) for a in (before, now)))
