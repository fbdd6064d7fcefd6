"""The closing lines of a run, from its report.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .words import Json, headline


def summary(report: Json, folder: Path) -> Iterator[str]:
    """What a run came to, from its report.json: for each target its verdict and its artifact's path, then the report's path."""
    for name, target in report["targets"].items():
        head = headline(report, name)
        yield " ".join((f"{name}: {head.state}.", head.sentence, *head.reasons))
        if target["artifact"] is not None:
            yield f"artifact: {folder / target['artifact']['path']}"
    yield f"report: {folder / 'report.html'}"
