"""Text and tables as Markdown, where nothing in a text can become markup."""

from __future__ import annotations

import re

from .words import Table


def md(text: str) -> str:
    """Text as Markdown shows it: nothing in it is markup, a table cell or a new line."""
    flat = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", flat)


def md_table(table: Table) -> list[str]:
    """A table with its caption; nothing where it has no rows."""
    if not table.rows:
        return []
    rule = ["---"] + ["--:" if table.numeric else "---"] * (len(table.head) - 1)
    rows = [table.head, rule, *table.rows]
    return [f"**{md(table.caption)}**", "", *("| " + " | ".join(c if r is rule else md(c) for c in r) + " |" for r in rows), ""]
