"""A run against a stored report: what counts as worse, and what the page of a CI job shows."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_compress.pipeline.audit import regression
from edge_compress.pipeline.audit.regression import Row, to_markdown
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.report.report import decode, encode
from edge_compress.pipeline.signature import Metric
from edge_compress.pipeline.verify.gates import packed
from fake_run import fake_results, to_report
from hypothesis import given
from hypothesis import strategies as st

OLD: dict[str, Any] = encode(to_report(fake_results(evaluations=3)))  # 91.18 % +- 0.315, 2.2473 to 2.3817


def compare(old: dict[str, Any], new: dict[str, Any], targets: tuple[str, ...]) -> tuple[Row, ...]:
    return regression.compare(decode(old), decode(new), targets)


def changed(**values: Any) -> dict[str, Any]:
    """The same report with other figures: `changed(accuracy__top1=90.0)`."""
    report = copy.deepcopy(OLD)
    for path, value in values.items():
        at, *rest = [report["targets"]["x86"]], *path.split("__")
        target = at[0]
        for key in rest[:-1]:
            target = target[key]
        target[rest[-1]] = value
    return report


def worse(new: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    return [row.worse for row in compare(old or OLD, new, ("x86",)) if row.worse]


def test_the_same_report_is_no_worse() -> None:
    rows = compare(OLD, OLD, ("x86",))
    assert [row.what for row in rows] == ["gates", "top-1", "speedup (95 % interval)", "size"]
    assert all(row.before == row.now and not row.worse and not row.remark for row in rows)


@pytest.mark.parametrize(("top1", "lost"), [(95.0, False), (91.0, False), (90.87, False), (90.86, True), (10.0, True)])
def test_accuracy_is_worse_when_it_fell_by_more_than_the_images_can_tell(top1: float, lost: bool) -> None:
    found = worse(changed(accuracy__top1=top1))
    assert bool(found) is lost
    assert not lost or found[0].startswith(f"accuracy: top-1 fell by {91.18 - top1:.2f} points")


def marked(report: dict[str, Any], right: int, wrong_at: int = 0) -> dict[str, Any]:
    """The report with so many of 5,000 images correct, all but a stretch from a position on."""
    images = np.ones(5000, bool)
    images[wrong_at : wrong_at + 5000 - right] = False
    found = copy.deepcopy(report)
    found["targets"]["x86"]["accuracy"] |= {"top1": right / 50, "correct": packed(images)}
    return found


def test_where_the_images_are_known_a_fall_that_chance_does_not_give_is_worse() -> None:
    old = marked(OLD, 4559)
    assert worse(old, old) == []
    (found,) = worse(marked(OLD, 4552), old)  # within the stored interval, but seven images are lost and none won
    assert "7 images are lost and 0 won" in found
    assert worse(marked(OLD, 4552, wrong_at=2000), old) == []  # other images: as many lost and won, but for seven
    assert worse(marked(OLD, 4566), old) == []


def test_one_image_is_no_fall_where_a_stored_interval_has_no_width() -> None:
    stored = changed(accuracy__drop_ci95_pp=[0.0, 0.0])
    assert worse(changed(accuracy__top1=91.16), stored) == []
    assert worse(changed(accuracy__top1=91.0), stored) != []


@pytest.mark.parametrize(
    ("interval", "lost"),
    [((1.0, 2.24), True), ((1.0, 2.25), False), ((2.0, 2.3), False), ((2.3, 9.0), False), ((3.0, 4.0), False)],
)
def test_a_speedup_is_worse_when_its_whole_interval_lies_below(interval: tuple[float, float], lost: bool) -> None:
    found = worse(changed(latency__speedup={"median": sum(interval) / 2, "ci95": list(interval)}))
    assert bool(found) is lost
    assert not lost or "its whole interval" in found[0]


@given(st.floats(0, 100), st.floats(0.1, 9), st.floats(0, 3))
def test_what_is_better_in_both_is_never_worse(top1: float, low: float, width: float) -> None:
    speedup = {"median": low + width / 2, "ci95": [low, low + width]}
    new = changed(accuracy__top1=top1, latency__speedup=speedup)
    assert bool(worse(new)) == (OLD["targets"]["x86"]["accuracy"]["top1"] - top1 > 0.315 + 1e-9 or low + width < 2.2473)


def test_a_gate_that_fails_now_is_worse_and_one_that_failed_before_is_not() -> None:
    failed = changed(verdict={"passed": False, "reasons": ["speedup: not real"]})
    assert worse(failed) == ["gates: speedup: not real"]
    assert worse(failed, failed) == []
    assert worse(OLD, failed) == []


@pytest.mark.parametrize("figure", ["accuracy", "latency"])
def test_a_figure_that_was_known_and_is_not_any_more_is_worse(figure: str) -> None:
    gone = changed(**{figure: {**dict.fromkeys(OLD["targets"]["x86"][figure]), "kind": "none", "device": "board"}})
    assert len(worse(gone)) == 1
    assert worse(OLD, gone) == []
    assert "none was stored" in [row.remark for row in compare(gone, OLD, ("x86",))]


def test_a_measured_speedup_does_not_become_an_emulated_one() -> None:
    assert worse(changed(latency__kind="emulated")) == ["speedup: it was measured, now it is emulated"]


def test_what_was_measured_elsewhere_is_said_beside_the_figures() -> None:
    environment = {**OLD["targets"]["x86"]["latency"]["environment"], "cpu": "another"}
    new = changed(latency__environment=environment, latency__speedup={"median": 1.5, "ci95": [1.4, 1.6]})
    (row,) = (row for row in compare(OLD, new, ("x86",)) if row.what.startswith("speedup"))
    assert row.remark == "another cpu"
    assert "another cpu" in row.worse


def test_other_data_and_other_targets_are_not_compared() -> None:
    other = changed()
    other["data"] = {**other["data"], "sha256": "00" * 32}
    with pytest.raises(InputError, match="of other data"):
        compare(other, OLD, ("x86",))
    with pytest.raises(InputError, match="none of these targets"):
        compare(OLD, OLD, ("phone",))
    new = changed()
    new["targets"]["phone"] = copy.deepcopy(new["targets"]["x86"])
    rows = compare(OLD, new, ("x86", "phone"))
    assert [row.remark for row in rows if row.target == "phone"] == ["not in the stored report"]
    assert not any(row.worse for row in rows)


def test_the_summary_is_markdown_with_the_reasons_on_top() -> None:
    rows = compare(OLD, changed(accuracy__top1=90.0), ("x86",))
    lines = to_markdown(rows, [("3 files", True), ("x86: other | answers", False)], "run_1 <b>").splitlines()
    assert lines[0] == "## edge-compress: run_1 &lt;b> got worse"
    assert lines[2].startswith("- **x86: accuracy: top-1 fell by 1.18 points")
    assert lines[3] == r"- **x86: other \| answers**"
    table = [line for line in lines if line.startswith("|")]
    assert {line.count(" |") + line.startswith("| |") for line in table} == {5}
    assert "| x86 | top-1 | 91.18 % | 90.00 % | worse |" in table
    assert lines[-1] == "- 3 files"
    assert to_markdown(compare(OLD, OLD, ("x86",)), [], "a").splitlines()[0] == "## edge-compress: a no worse than before"


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(report: dict[str, Any]) -> Path:
        path = tmp_path / "old.json"
        path.write_text(json.dumps(report))
        return path

    return write


@pytest.mark.parametrize(("name", "higher"), [("perplexity", False), ("top-1", False), ("F1", True)])
def test_values_of_different_metrics_are_not_compared(name: str, higher: bool) -> None:
    other = replace(decode(OLD), metric=Metric(name, "%", higher))
    for pair in ((other, decode(OLD)), (decode(OLD), other)):
        with pytest.raises(InputError, match="another metric"):
            regression.compare(*pair, ("x86",))


def test_a_value_that_is_nan_now_is_worse() -> None:
    old = replace(decode(OLD), metric=Metric("F1", "", True))
    accuracy = old.targets["x86"].accuracy
    assert accuracy is not None
    broken = replace(old.targets["x86"], accuracy=replace(accuracy, value=math.nan, drop=math.nan))
    found = [row.worse for row in regression.compare(old, replace(old, targets={"x86": broken}), ("x86",)) if row.worse]
    assert found == ["accuracy: F1 is NaN now"]
