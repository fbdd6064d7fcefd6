"""Formats numbers, tables and text for the pages (units, decimals, kinds, Markdown), and fills in their templates.

Every number that is shown passes through `tag`: what was not measured is labelled where it appears.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ..signature import Metric
from ..types import Kind

DASH = "–"
TEMPLATES = Path(__file__).parent / "templates"
_NB = "\u00a0"  # a number and its unit stay on one line


@dataclass(frozen=True)
class Table:
    """A table of text; the first column heads its row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True  # all columns but the first are numbers


def tag(text: str, kind: str) -> str:
    """The text with its kind, where that is not `measured`."""
    return text if kind == Kind.MEASURED or text == DASH else f"{text} ({kind})"


def aside(text: str, kind: str) -> str:
    """The text with its kind after a comma, for parentheses and remarks."""
    return text if kind == Kind.MEASURED else f"{text}, {kind}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash where there is none, or none that is finite."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}".replace("-", "−")


def bare(metric: Metric, value: float | None) -> str:
    """A value of a metric without its unit."""
    return fixed(value) if metric.unit or value is None or not math.isfinite(value) else f"{value:.4g}".replace("-", "−")


def points(metric: Metric, value: float) -> str:
    """A difference of two values: points where the metric is in per cent, else with its unit."""
    return f"{bare(metric, value)} {'points' if metric.unit == '%' else metric.unit}".rstrip()


def labelled(metric: Metric, where: str = "") -> str:
    """A metric's name and unit, for the head of a row or column."""
    return f"{metric.name}{where}{f', {metric.unit}' if metric.unit else ''}"


def interval(ends: tuple[float, float], digits: int = 2) -> str:
    """The ends of an interval."""
    return f"{fixed(ends[0], digits)} to {fixed(ends[1], digits)}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as percent."""
    return DASH if share is None else fixed(100.0 * share)


def millis(value: float) -> str:
    """Milliseconds, to three digits or so."""
    return f"{value:,.{3 if value < 1 else 2 if value < 100 else 0}f}"


def count(value: int) -> str:
    """A count; millions from one million on."""
    return f"{value / 1e6:,.2f}{_NB}M" if value >= 1e6 else f"{value:,}"


def size(value: int) -> str:
    """Bytes as kB or MB (powers of ten)."""
    return f"{value / 1e6:,.2f}{_NB}MB" if value >= 1e6 else f"{value / 1e3:,.1f}{_NB}kB"


def moment(iso: str) -> str:
    """An ISO 8601 time for people."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 120:
        return f"{value:,.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min {rest} s"


def md(text: str) -> str:
    """Text for Markdown: nothing in it is markup, a table cell or a new line."""
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", flat)


def md_table(table: Table) -> list[str]:
    """The lines of a table with its caption in Markdown; none where it has no rows."""
    if not table.rows:
        return []
    rule = ["---"] + ["--:" if table.numeric else "---"] * (len(table.head) - 1)
    rows = [table.head, rule, *table.rows]
    return [f"**{md(table.caption)}**", "", *("| " + " | ".join(c if r is rule else md(c) for c in r) + " |" for r in rows), ""]


def render(template: str, **values: Any) -> str:
    """The text of a template in `templates/`; a value it names and does not get is an error.

    HTML is escaped; in Markdown templates the filter `md` escapes what comes from outside.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=template.endswith(".md.jinja"),
    )
    environment.filters |= {"md": md, "count": count, "size": size}
    return environment.get_template(template).render(values)
