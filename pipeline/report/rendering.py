"""Fills in the templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from .format import count, md, size

TEMPLATES = Path(__file__).parent / "templates"


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
