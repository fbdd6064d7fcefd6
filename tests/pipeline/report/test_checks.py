"""A report.json from outside whose figures no run has: one line and 2, on every page that would be made of it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.report import pages
from edge_compress.pipeline.report.report import decode, encode, read_report
from fake_run import fake_results, to_report

REPORT = encode(to_report(fake_results(evaluations=5)))
TENSOR = {"name": "input", "shape": [1, 3, 32, 32], "layout": "NCHW", "dtype": "float32"}
POINT = {"budget": "0.5", "run": "budgets/0.5", "target": "x86", "passed": True, "taken": True, "kind": "measured"}
OUTSIDE = {"path": "stages/../../etc/passwd", "sha256": "ab" * 32, "size_bytes": 10}
ZERO = {"median": 0.0, "ci95": [0.0, 0.0]}


def set_to(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        at: Any = report
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


X86 = ("targets", "x86")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_to("pruned", "knobs", 0, "size", value=0), "knobs"),
        (set_to("pruned", "knobs", 0, "kept", value=-1), "knobs"),
        (set_to(*X86, "accuracy", "classes", value={"cat": [0, 0, 0, 0]}), "cat"),
        (set_to(*X86, "accuracy", "classes", value={"cat": [10, 9, 5, 2]}), "cat"),
        (set_to(*X86, "accuracy", "samples", value=0), "samples"),
        (set_to(*X86, "accuracy", "top1", value=250.0), "accuracy"),
        (set_to(*X86, "artifact", "inputs", value=[TENSOR | {"dtype": "nonsense"}]), "nonsense"),
        (set_to(*X86, "artifact", "inputs", value=[TENSOR | {"dtype": "(,)f4"}]), "dtype"),
        (set_to(*X86, "artifact", "inputs", value=[TENSOR | {"dtype": "2f4"}]), "dtype"),
        (set_to(*X86, "artifact", "inputs", value=[TENSOR | {"shape": [1]}]), "shape"),
        (set_to(*X86, "artifact", "inputs", value=[TENSOR | {"shape": [1] * 65, "layout": ""}]), "65 axes"),
        (set_to(*X86, "latency", "dense_samples_ms", value=[]), "a sample of no time, or none"),
        (set_to(*X86, "latency", "artifact_samples_ms", value=[]), "a sample of no time, or none"),
        (set_to(*X86, "latency", "environment", value={"pairs_per_session": f"{10**20},1"}), "pairs_per_session"),
        (set_to(*X86, "latency", "environment", value={"pairs_per_session": "5,-1"}), "pairs_per_session"),
        (set_to(*X86, "golden", value=OUTSIDE | {"path": "artifacts/x86/gol den"}), "not a name that a run gives"),
        (set_to(*X86, "golden", value=OUTSIDE | {"path": "artifacts/x86/.golden"}), "not a name that a run gives"),
        (set_to(*X86, "golden", value=OUTSIDE | {"path": "artifacts/x86/gol\nden"}), "not a name that a run gives"),
        (set_to(*X86, "latency", "speedup", value=ZERO), "speedup"),
        (set_to("pruned", "params", value=10**400), "64 bits"),
        (set_to("front", value=[POINT | {"speedup": ZERO}]), "speedup"),
        (set_to("model", "name", value="net\ud800"), "surrogate"),
        (set_to("stage_seconds", "search", value=math.nan), "NaN|finite"),
        (set_to("stage_seconds", "search", value=1e305), r"beyond 1e\+300"),
        (set_to("gates", "latency_budget", value=None), "budget"),
        (set_to("finished", value="yesterday"), "yesterday"),
        (set_to("tool", "packages", "", value="1.0"), "package"),
        (set_to("pruned", "search", "best_index", value=99), "best_index"),
        (set_to("pruned", "state", value=OUTSIDE), "leads out of the run folder"),
        (set_to("pruned", "masks", value=OUTSIDE), "leads out of the run folder"),
        (set_to(*X86, "pictures", value=[[OUTSIDE, OUTSIDE]]), "leads out of the run folder"),
        (set_to(*X86, "golden", value=OUTSIDE), "leads out of the run folder"),
        (set_to("pruned", "state", "path", value="/etc/passwd"), "leads out of the run folder"),
        (set_to("pruned", "state", "path", value="C:\\passwd"), "leads out of the run folder"),
        (set_to("pruned", "state", "path", value=["stages"]), "path: str was expected, found list"),
        (set_to(*X86, "verdict", "reasons", value=[1]), "reasons.*str was expected, found int"),
        (set_to(*X86, "artifact", "path", value={"of": "x86"}), "path: str was expected, found dict"),
    ],
)
def test_figures_that_no_run_has_are_refused_in_one_line(
    change: Callable[[dict[str, Any]], None], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = copy.deepcopy(REPORT)
    change(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match=named):
        read_report(tmp_path / "report.json")
    assert main(["report", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_report_that_no_page_can_be_made_of_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    monkeypatch.setattr(pages, "figures", lambda report: 1 / 0)
    assert main(["report", str(tmp_path)]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"[" * 100_000, b" " * ((64 << 20) + 1)])
def test_json_that_is_too_deep_or_too_large_is_one_line(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(InputError, match=r"nested too deep|larger than 64 MiB"):
        read_report(tmp_path / "report.json")


def test_every_report_of_ours_passes() -> None:
    assert encode(decode(REPORT)) == REPORT
