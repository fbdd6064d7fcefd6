"""Runs the Python code that a report prints under "Use it"."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_compress.pipeline.report.report import read_report
from edge_compress.pipeline.report.usage import snippets


def printed(folder: Path, target: str, language: str = "Python") -> tuple[str, Callable[..., Any]]:
    """The code for a target's artifact as printed, run beside the artifact, and its function `predict`."""
    report = read_report(folder / "report.json")
    (code,) = (snippet.code for snippet in snippets(report, target) if snippet.language == language)
    artifact = report.targets[target].artifact
    assert artifact is not None
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir((folder / artifact.path).parent)
    try:
        exec(compile(code, f"{target}.py", "exec"), names)
    finally:
        os.chdir(before)
    return code, names["predict"]
