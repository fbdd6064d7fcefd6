"""Writes to the terminal; keeps stdout for the caller."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import click

from ..errors import printable


def echo(text: str, *, err: bool = False) -> None:
    """Prints text with control characters escaped, on stdout or stderr."""
    click.echo(printable(text), err=err)


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Redirects to stderr what libraries print (torch.onnx does, and C++ below it): stdout is the caller's."""
    if sys.stdout is not None:
        sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
