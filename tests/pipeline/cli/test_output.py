"""Stdout is the caller's: what libraries print does not get there, not even late."""

from __future__ import annotations

import os
import subprocess
import sys

PRINTING = """
import ctypes, os, sys
from edge_compress.pipeline.cli.output import echo, stdout_kept_clean
libc = ctypes.CDLL(None)
with stdout_kept_clean():
    print("python")
    sys.__stdout__.write("python, below\\n")
    libc.printf(b"library\\n")
    os.write(1, b"descriptor\\n")
echo("answer")
"""


def test_what_libraries_leave_in_a_buffer_does_not_come_out_on_stdout() -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", PRINTING], capture_output=True, text=True, check=True, env=buffered)
    assert done.stdout == "answer\n"
    assert sorted(done.stderr.splitlines()) == ["descriptor", "library", "python", "python, below"]
