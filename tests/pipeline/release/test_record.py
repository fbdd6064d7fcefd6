"""A record on disk: what its files must be, what may lie elsewhere, and what is no record."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from edge_compress.pipeline.audit.audit import artifacts_of
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.release.record import digest_findings, full_report, open_record
from edge_compress.pipeline.report.report import encode
from fake_run import fake_results, to_report

REPORT = encode(to_report(fake_results(evaluations=2)))


def report_of(targets: Any, **changes: Any) -> str:
    """A whole report.json with other targets."""
    return json.dumps({**REPORT, "targets": targets, **changes})


def target_of(entry: dict[str, Any] | None) -> dict[str, Any]:
    """A target with another file for its artifact."""
    whole = REPORT["targets"]["x86"]
    artifact = None if entry is None else {**whole["artifact"], "baseline": None, **entry}
    return {**whole, "artifact": artifact}


def file_entry(path: Path, folder: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"path": str(path.relative_to(folder)), "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def findings(path: Path) -> list[str]:
    with open_record(path) as record:
        return digest_findings(record)[0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "state.safetensors").parent.mkdir()
    (folder / "state.safetensors").write_bytes(b"the network")
    targets = {"jetson": target_of(None)}
    for name, data in (("x86", b"one artifact"), ("phone", b"another one")):
        path = folder / "artifacts" / name / "model.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        targets[name] = target_of(file_entry(path, folder))
    pruned = {**REPORT["pruned"], "state": file_entry(folder / "state.safetensors", folder)}
    (folder / "report.json").write_text(report_of(targets, pruned=pruned))
    return folder


def test_a_page_that_is_drawn_from_the_report_has_no_record_to_hold_against(run):
    (run / "report.md").write_text("forged")
    assert findings(run / "report.md") == ["report.md is drawn from report.json and has no record of its own"]


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_link_in_the_place_of_a_file_is_found_even_where_what_it_leads_to_is_right(run, tmp_path, where):
    inside = run / "artifacts" / "x86"
    if where == "folder":
        inside.rename(tmp_path / "moved")
        inside.symlink_to(tmp_path / "moved")
    else:
        (inside / "model.bin").rename(tmp_path / "moved.bin")
        (inside / "model.bin").symlink_to(tmp_path / "moved.bin")
    assert findings(run) == ["x86: artifacts/x86/model.bin is a symbolic link, not a file of the run"]


@pytest.mark.parametrize(("targets", "told"), [({}, "no target"), ("other", "artifacts/x86/model.bin as the artifact of phone")])
def test_a_report_without_targets_or_with_renamed_ones_is_none(run, targets, told):
    x86 = json.loads((run / "report.json").read_text())["targets"]["x86"]
    (run / "report.json").write_text(report_of(targets if targets == {} else {"phone": x86}))
    with pytest.raises(InputError, match=told):
        findings(run)


def test_a_run_as_it_was_written_holds(run):
    assert findings(run) == []
    assert findings(run / "artifacts" / "x86" / "model.bin") == []
    assert findings(run / "report.json") == []
    assert findings(run / "artifacts") == []


def test_a_missing_artifact_is_found(run):
    (run / "artifacts/x86/model.bin").unlink()
    assert findings(run) == ["x86: artifacts/x86/model.bin is missing"]


@pytest.mark.parametrize(
    ("data", "words"), [(b"one artifacT", "another SHA-256"), (b"one artifact.", "13 bytes, not 12"), (b"", "0 bytes")]
)
def test_a_changed_artifact_is_found(run, data, words):
    file = run / "artifacts/x86/model.bin"
    file.write_bytes(data)
    for path in (run, file):
        (found,) = findings(path)
        assert found.startswith("x86: artifacts/x86/model.bin")
        assert words in found
    assert findings(run / "artifacts/phone/model.bin") == []  # asked about the other one alone


def test_every_damage_is_listed(run):
    (run / "artifacts/x86/model.bin").unlink()
    (run / "artifacts/phone/model.bin").write_bytes(b"")
    assert len(findings(run)) == 2


def test_a_file_the_report_does_not_know_is_foreign(run):
    foreign = run / "artifacts" / "x86" / "other.bin"
    foreign.write_bytes(b"one artifact")
    assert findings(foreign) == ["other.bin is not named in the report"]


def test_where_there_is_no_report_there_is_nothing_to_verify(run, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", run / "artifacts" / "x86" / "gone.bin"):
        with pytest.raises(InputError, match="nothing to verify at"):
            findings(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        report_of(3),
        report_of({"x86": {}}),
        report_of({"x86": {**REPORT["targets"]["x86"], "artifact": 3}}),
        report_of({}, seed="zero"),
        report_of({}, passed=1),
        report_of({}, notes="a note"),
        report_of({}, schema=2),
        report_of({}, another_key=1),
        json.dumps({key: value for key, value in REPORT.items() if key != "model"}),
    ],
)
def test_a_report_that_is_none_is_wrong_input(run, text):
    (run / "report.json").write_text(text)
    with pytest.raises(InputError, match="is not a report") as caught:
        findings(run)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "artifacts/../../secret", "a\\b", "", "."])
def test_a_path_that_leads_elsewhere_makes_no_record(run, path):
    (run.parent / "secret").write_bytes(b"")
    entry = {"path": path, "sha256": hashlib.sha256(b"").hexdigest(), "size_bytes": 0}
    for target in (target_of(entry), {**target_of(None), "golden": entry}):
        (run / "report.json").write_text(report_of({"x86": target}))
        with pytest.raises(InputError, match=r"is not a report.*leads out of the run folder"), open_record(run):
            pass


def test_baseline_golden_images_and_the_networks_state_are_looked_at_too(run):
    for name in ("baseline.bin", "golden.safetensors", "state.safetensors"):
        (run / name).write_bytes(name.encode())
    refs = {name: file_entry(run / name, run) for name in ("baseline.bin", "golden.safetensors", "state.safetensors")}
    report = json.loads((run / "report.json").read_text())
    report["targets"]["x86"]["artifact"]["baseline"] = refs["baseline.bin"]
    report["targets"]["x86"]["golden"] = refs["golden.safetensors"]
    report["pruned"] |= {"state": refs["state.safetensors"], "masks": None}
    (run / "report.json").write_text(json.dumps(report))
    assert findings(run) == []
    for name in refs:
        (run / name).unlink()
    assert [text.split(": ")[1] for text in findings(run)] == [f"{name} is missing" for name in refs]


def test_a_stored_report_has_to_be_whole(run):
    (run / "report.json").write_text('{"targets": {}}')
    with pytest.raises(InputError, match="is not a report"):
        full_report(run / "report.json")
    with pytest.raises(InputError, match="is not a report"):
        full_report(run / "absent.json")


def test_a_file_far_below_a_report_of_another_run_is_not_verified_by_it(run):
    elsewhere = run / "data" / "of" / "mine"
    elsewhere.mkdir(parents=True)
    (elsewhere / "model.bin").write_bytes(b"mine")
    for path in (elsewhere / "model.bin", elsewhere, run / "data"):
        with pytest.raises(InputError, match="nothing to verify at"):
            findings(path)


def test_links_in_a_circle_are_found_whatever_file_is_asked_for(run):
    model = run / "artifacts/x86/model.bin"
    model.unlink()
    model.symlink_to(model)
    assert findings(run) == ["x86: artifacts/x86/model.bin is a symbolic link, not a file of the run"]
    assert findings(run / "artifacts/phone/model.bin") == []
    with open_record(run / "artifacts/phone/model.bin") as record:
        assert artifacts_of(record) == ["phone"]
