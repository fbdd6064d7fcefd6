"""The pages of a report, made from it alone: report.html, report.md, and the closing lines of a run."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

from ..files import atomic_write, read_referenced
from .figures import (
    class_table,
    confusion_table,
    figures,
    finetune_table,
    front_table,
    kept_table,
    layer_table,
    protocol_table,
    removed_table,
)
from .format import Table, fixed, md, md_table, moment, render
from .report import Refusal, Report, TargetReport, to_text
from .usage import interface, snippets
from .words import (
    conversion,
    dense_and_artifact,
    environment,
    headline,
    how_measured,
    verdict_line,
)

PARTS = (class_table, confusion_table, layer_table)  # of a target's accuracy and latency: where they come from


def write_report(folder: Path, report: Report) -> None:
    """Write report.md, report.html and, last of all, report.json."""
    atomic_write(folder / "report.md", to_markdown(report))
    atomic_write(folder / "report.html", to_html(report, folder))
    atomic_write(folder / "report.json", to_text(report))


def write_refusal(folder: Path, refusal: Refusal) -> None:
    """Writes the report of a run that ended before its search; an earlier run in the folder may have left the page of another."""
    reasons = [f"- {md(name)}: {md(target.why)}" for name, target in refusal.targets.items()]
    atomic_write(folder / "report.md", "\n".join([f"# {md(refusal.model.name)} was refused", "", *reasons, ""]))
    atomic_write(folder / "report.html", render("refusal.html.jinja", refusal=refusal, finished=moment(refusal.finished)))
    atomic_write(folder / "report.json", to_text(refusal))


def to_html(report: Report, folder: Path | None = None) -> str:
    """`report.html`: one self-contained page; everything from outside is escaped. Pictures are read from the run folder."""
    built = [name for name, target in report.targets.items() if target.artifact is not None]
    shown = {} if folder is None else {name: _pictures(target, folder) for name, target in report.targets.items()}
    return render(
        "report.html.jinja",
        report=report,
        verdict=verdict_line(report),
        headlines=[headline(report, name) for name in report.targets],
        finished=moment(report.finished),
        pictures=shown,
        left_out={name: len(report.targets[name].pictures) - len(pairs) for name, pairs in shown.items()},
        budgets=[table for name in report.targets if (table := front_table(report, name)).rows],
        plots=figures(report),
        comparisons=[dense_and_artifact(report, name) for name in built or [*report.targets][:1]]
        + [table for table in (removed_table(report),) if table.rows]
        + [table for name in built for draw in PARTS if (table := draw(report, name)).rows],
        settings=[table for name in report.targets if (table := protocol_table(report, name)).rows],
        details=[t for name in report.targets for t in (how_measured(report, name), conversion(report, name)) if t],
        environment=environment(report),
        uses=[(name, _interface(report, name), code) for name in report.targets if (code := snippets(report, name))],
    )


def _pictures(target: TargetReport, folder: Path) -> list[tuple[str, str]]:
    """The files of a target's pictures as data URIs, in pairs; without those that are no longer the run's own."""
    found = [[read_referenced(ref, folder) for ref in pair] for pair in target.pictures]
    return [(_uri(dense), _uri(artifact)) for dense, artifact in found if dense is not None and artifact is not None]


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def to_markdown(report: Report) -> str:
    """`report.md`: the verdict, the tables and the command."""
    lines = [f"# {md(verdict_line(report))}", "", md(f"{report.model.name} on {report.data.name}"), ""]
    for name in report.targets:
        head = headline(report, name)
        lines += [f"## {md(name)}: {head.state}", "", md(head.sentence), ""]
        lines += [f"- {md(reason)}" for reason in head.reasons] + [f"- {tip}" for tip in head.advice]
        lines += [""] if head.reasons or head.advice else []
        for table in (
            dense_and_artifact(report, name),
            *(draw(report, name) for draw in PARTS),
            how_measured(report, name),
            protocol_table(report, name),
            conversion(report, name),
        ):
            lines += md_table(table) if table else []
    for name in report.targets:
        lines += md_table(front_table(report, name))
    lines += ["## What was removed", ""]
    for table in (removed_table(report), kept_table(report), finetune_table(report)):
        lines += md_table(table)
    for name in report.targets:
        lines += to_use(report, name)
    lines += ["## The run", ""]
    for table in environment(report):
        lines += md_table(table)
    return "\n".join([*lines, "The command:", "", *_fenced("sh", report.command), ""])


def to_use(report: Report, name: str) -> list[str]:
    """Returns the lines of "Use it" in Markdown: input and output tensors, and inference code."""
    found = snippets(report, name)
    if not found:
        return []
    lines = [f"## Use it: {md(name)}", "", *md_table(_interface(report, name))]
    for snippet in found:
        lines += [f"{snippet.language}; needs {md(snippet.needs)}:", "", *_fenced(snippet.syntax, snippet.code), ""]
    return lines


def _interface(report: Report, name: str) -> Table:
    artifact = report.targets[name].artifact
    assert artifact is not None  # it has snippets
    return interface(name, artifact, report.data.classes)


def _fenced(syntax: str, code: str) -> list[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", code)), default=0))
    return [f"{fence}{syntax}", code.rstrip("\n"), fence]


def summary(report: Report, folder: Path) -> Iterator[str]:
    """The closing lines of a run: for each target its verdict and its artifact's path, then the report's path."""
    for name, target in report.targets.items():
        head = headline(report, name)
        yield " ".join((f"{name}: {head.state}.", head.sentence, *head.reasons))
        if target.artifact is not None:
            yield f"artifact: {folder / target.artifact.path}"
    for point in report.front:
        value = "no value" if point.value is None else report.metric.shown(point.value)
        speed = "not timed" if point.speedup is None else f"{fixed(point.speedup.median)}× over dense float"
        state = "passed" if point.passed else "failed"
        taken = ", taken" if point.taken else ""
        yield f"budget {point.budget}, {point.target}: {value}, {speed}, {state}{taken}: {folder / point.run}"
    yield f"report: {folder / 'report.html'}"
