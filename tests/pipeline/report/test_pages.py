"""The files of a report in a run folder: what is read for them, and what a refused run leaves there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.files import file_ref
from edge_compress.pipeline.report import pages
from edge_compress.pipeline.report.report import Header, Refusal, Report, TargetReport, read_report
from edge_compress.pipeline.types import Verdict
from fake_run import fake_results, fake_target, to_report


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "figures", lambda report: ())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose report has two pictures."""
    folder = tmp_path / "run"
    kept = folder / "artifacts" / "x86"
    kept.mkdir(parents=True)
    for name in ("dense", "artifact"):
        (kept / f"{name}.png").write_bytes(f"PNG of {name}".encode())
    pair = (file_ref(kept / "dense.png", folder), file_ref(kept / "artifact.png", folder))
    pages.write_report(folder, to_report(fake_results(targets={"x86": dataclasses.replace(fake_target(), pictures=(pair,))})))
    return folder


def shown(run: Path) -> int:
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text().count("data:image/png;base64")


def test_a_page_that_is_drawn_again_keeps_its_pictures(run: Path) -> None:
    before = (run / "report.html").read_text()
    assert shown(run) == 2
    assert (run / "report.html").read_text() == before


@pytest.mark.parametrize("how", ["another content", "a link", "a link to its folder", "missing"])
def test_a_picture_that_is_not_the_reports_own_is_left_out_of_the_page(run: Path, tmp_path: Path, how: str) -> None:
    file = run / "artifacts" / "x86" / "dense.png"
    if how == "another content":
        file.write_bytes(b"PNG of other")
    elif how == "a link":
        file.rename(tmp_path / "elsewhere.png")
        file.symlink_to(tmp_path / "elsewhere.png")
    elif how == "a link to its folder":
        file.parent.rename(tmp_path / "elsewhere")
        file.parent.symlink_to(tmp_path / "elsewhere")
    else:
        file.unlink()
    assert shown(run) == 0
    assert "because their files are missing or were changed: 1." in pages.to_html(read_report(run / "report.json"), run)


def refusal(report: Report) -> Refusal:
    header = {field.name: getattr(report, field.name) for field in dataclasses.fields(Header)}
    verdict = Verdict(False, ("the converter has no <Einsum>",))
    return Refusal(**header, dense=report.dense, targets={"x86": TargetReport("failed", verdict)})


def test_a_refused_run_leaves_no_page_that_says_it_passed(run: Path) -> None:
    assert "All gates passed" in (run / "report.html").read_text()
    pages.write_refusal(run, refusal(read_report(run / "report.json")))
    page = (run / "report.html").read_text()
    assert "All gates passed" not in page
    assert "x86: the converter has no &lt;Einsum&gt;" in re.sub(r"<[^>]*>", "", page)
    assert "was refused" in page


def test_the_report_of_a_refused_run_is_read_as_the_reason_it_was_refused_for(run: Path) -> None:
    pages.write_refusal(run, refusal(read_report(run / "report.json")))
    with pytest.raises(InputError, match=r"report\.json.*refused.*x86: the converter has no <Einsum>") as raised:
        read_report(run / "report.json")
    assert "\n" not in str(raised.value)
