"""Writes to the terminal; keeps stdout for the caller."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import click

from ..errors import printable


def echo(text: str, *, err: bool = False) -> None:
    """Prints text with control characters escaped, on stdout or stderr."""
    click.echo(printable(text), err=err)


def loading() -> None:
    """Says, on stderr, why nothing else is seen for some seconds."""
    echo("  loading PyTorch and the runtimes, which takes some seconds", err=True)


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Redirects to stderr what libraries print (torch.onnx does, and C++ below it): stdout is the caller's."""
    _flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        try:
            _flush()  # what is left in a buffer would come out among the caller's lines
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _flush() -> None:
    """Empties the buffers that lead to stdout: Python's, and those of the C library."""
    for stream in {sys.stdout, sys.__stdout__}:
        if stream is not None:
            with contextlib.suppress(ValueError):  # it was closed
                stream.flush()
    ctypes.CDLL(None).fflush(None)
