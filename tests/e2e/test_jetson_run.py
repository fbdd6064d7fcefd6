"""Runs for the Jetson target without a Jetson: files, script and manifest, no engine and no latency anywhere."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Finished, Workshop, report_of
from edge_compress import targets
from edge_compress.targets.base import joint
from pretended_jetson import jetsons

STANDIN = Path(__file__).parents[1] / "support" / "trtexec_standin.py"
QUICK = {"search": "knapsack", "evaluations": 10, "score": "magnitude"}
ALONE = {
    "target": "jetson",
    "latency_budget": 0.85,
    **QUICK,
}  # an estimate leaves int8 out: the usual budget is too low
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def latencies(value: Any, path: str = "") -> list[str]:
    """Where a number stands under a name that speaks of time."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in latencies(item, f"{path}.{key}")]
    if isinstance(value, list):
        return [found for item in value for found in latencies(item, path)]
    timed = any(word in path for word in ("latency", "_ms", "_ns", "speedup", "samples_ms"))
    return [path] if timed and isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jetson") / "run"
    finished = workshop.call(workshop.arguments(folder, **ALONE))
    assert finished.code == 0, finished.err
    assert finished.out.splitlines()[0].startswith("jetson: not built.")
    assert "build.sh" in finished.out
    return folder


def test_the_report_says_not_built_and_has_no_latency_for_the_target(folder: Path) -> None:
    report = report_of(folder)
    target = report["targets"]["jetson"]
    assert target["status"] == "not_built"
    assert target["verdict"]["passed"] is report["passed"] is False
    assert target["verdict"]["reasons"][0].startswith("no engine was built")
    assert target["latency"]["kind"] == "none"
    assert latencies(target) == []
    assert target["accuracy"]["kind"] == "estimated"
    assert target["accuracy"]["samples"] > 100
    assert target["artifact"]["format"] == "onnx"


def test_the_search_is_never_said_to_have_measured(folder: Path) -> None:
    report = report_of(folder)
    search = report["pruned"]["search"]
    assert {c["latency_kind"] for c in search["tried"]} == {search["best"]["latency_kind"]} == {"estimated"}
    assert (search["latency_measured"], search["latency_reused"], search["table_error"]) == (0, 0, None)
    assert search["best"]["latency_ratio"] <= 0.85 * 1.02
    assert any("no time of any device" in note for note in report["notes"])
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "jetson: not built" in page
    assert "estimated, none measured" in page
    assert "(measured)" not in page


def test_script_and_manifest_lie_beside_the_files_and_build_what_the_report_names(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder / "artifacts" / "jetson", tmp_path / "jetson")
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["files"]["model"]["sha256"] == report_of(folder)["targets"]["jetson"]["artifact"]["sha256"]
    program = tmp_path / "trtexec"
    program.write_text(STANDIN.read_text().replace('"""A', f'#!{sys.executable}\n"""A', 1))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "trtexec.json").write_text('{"version": "100300"}')
    subprocess.run(["sh", str(place / "build.sh")], check=True, env=os.environ | {"TRTEXEC": str(program)})
    assert (place / "model.engine").exists()


def test_the_same_command_goes_on_where_it_was(folder: Path, workshop: Workshop) -> None:
    again = workshop.run(workshop.arguments(folder, **ALONE))
    assert (again.code, again.stages) == (0, [])


def test_verify_finds_every_file_as_the_report_says(folder: Path, workshop: Workshop) -> None:
    assert workshop.call(["verify", str(folder)]).code == 0


def test_a_required_artifact_ends_the_run_at_once(workshop: Workshop, tmp_path: Path) -> None:
    finished = workshop.call([*workshop.arguments(tmp_path / "run", target="jetson", **QUICK), "--require-artifact"])
    assert finished.code == 3
    assert finished.err.count("\n") == 1
    assert "no board with TensorRT" in finished.err
    assert not (tmp_path / "run").exists()


def test_two_targets_share_search_and_fine_tuning_and_only_one_is_measured(workshop: Workshop, tmp_path: Path) -> None:
    arguments = ["--target", "jetson", *workshop.arguments(tmp_path / "run", **QUICK)]
    finished = workshop.call(arguments)
    report = report_of(tmp_path / "run")
    assert finished.code == 0, finished.err
    assert [s for s in finished.stages if s in ("search", "fine-tune")] == ["search", "fine-tune"]
    assert {name: t["status"] for name, t in report["targets"].items()} == {"jetson": "not_built", "x86": "ok"}
    assert report["targets"]["x86"]["latency"]["kind"] == "measured"
    assert latencies(report["targets"]["jetson"]) == []
    assert {c["latency_kind"] for c in report["pruned"]["search"]["tried"]} == {"measured"}  # the search was x86's
    limits = joint([targets.load("x86"), targets.load("jetson")])
    counts = {(k["size"], k["kept"]) for k in report["pruned"]["knobs"] if k["kind"] != "block"}
    assert {kept % limits.step(size) for size, kept in counts} == {0}


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A board's file; its trtexec is a stand-in, and says so."""
    (nano,) = jetsons(tmp_path, monkeypatch, "nano")
    return nano.file


def test_a_board_whose_trtexec_is_a_standin_gives_no_latency_to_the_search(
    pretended: Path, workshop: Workshop, tmp_path: Path
) -> None:
    arguments = workshop.arguments(tmp_path / "run", target="jetson", device=pretended, **QUICK)
    finished: Finished = workshop.call(arguments)
    assert finished.code == 3
    assert "stamped simulated" in finished.err.splitlines()[-1]
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_simulated_engine_is_no_engine_and_gives_no_latency_to_the_report(
    pretended: Path, workshop: Workshop, tmp_path: Path
) -> None:
    arguments = [*workshop.arguments(tmp_path / "run", device=pretended, **QUICK), "--target", "jetson"]
    finished = workshop.call(arguments)
    assert finished.code == 0, finished.err
    report = report_of(tmp_path / "run")
    assert report["targets"]["x86"]["status"] == "ok"
    target = report["targets"]["jetson"]
    assert target["status"] == "not_built"
    assert "stamped simulated" in target["verdict"]["reasons"][0]
    assert latencies(target) == []
    assert target["accuracy"]["kind"] == "estimated"
    assert not list((tmp_path / "run" / "artifacts").rglob("*.engine"))


def test_an_accuracy_that_is_over_its_gate_fails_the_run_without_an_engine_too(workshop: Workshop, tmp_path: Path) -> None:
    finished = workshop.call(workshop.arguments(tmp_path / "run", **{**ALONE, "latency_budget": 0.42}, max_accuracy_drop=0.1))
    target = report_of(tmp_path / "run")["targets"]["jetson"]
    assert finished.code == 1
    assert target["status"] == "not_built"
    assert "(estimated), at most 0.1 allowed" in target["verdict"]["reasons"][1]
