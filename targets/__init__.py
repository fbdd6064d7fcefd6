"""One file per runtime: what it can run, how its artifact is built, how it is run."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..pipeline.errors import InputError

if TYPE_CHECKING:
    from .base import Target

_BINDS_TARGET = re.compile(r"^TARGET\b[^=\n]*=(?!=)", re.MULTILINE)


def names() -> tuple[str, ...]:
    """The targets there are: modules of this folder that bind `TARGET`, by file name, sorted.

    The source text is read, nothing is imported: a target whose packages are missing is listed all the same.
    """
    files = (path for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
    return tuple(sorted(path.stem for path in files if _BINDS_TARGET.search(path.read_text(encoding="utf-8"))))


def load(name: str) -> Target:
    """The target of this name.

    Raises:
        InputError: there is none.
    """
    check(name)
    return cast("Target", import_module(f".{name}", __name__).TARGET)


def check(name: str) -> None:
    """Raise InputError, naming the targets there are, if `name` is none of them. Imports nothing."""
    if name not in names():
        near = get_close_matches(name.lower(), names(), 1)
        do = "give --target once for each" if "," in name else f"did you mean {near[0]}?" if near else ""
        expected = " or ".join(names()) or "none: no target is installed"
        raise InputError("unknown target", found=repr(name), expected=expected, do=do)
