"""Several runs on one page: only what is comparable stands side by side, and only measured latencies are drawn."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from edge_compress.pipeline.report import run_comparison
from edge_compress.pipeline.report.plots import pareto
from edge_compress.pipeline.report.plots.pareto import Point, front, plot
from edge_compress.pipeline.report.plots.svg import Label
from edge_compress.pipeline.report.report import decode, encode
from edge_compress.pipeline.report.run_comparison import groups
from edge_compress.pipeline.types import Kind
from fake_run import RunResults, fake_results, fake_target
from fake_run import to_report as collected
from hypothesis import given
from hypothesis import strategies as st


def to_report(results: RunResults) -> dict[str, Any]:
    return encode(collected(results))


def to_html(reports: list[tuple[str, dict[str, Any]]]) -> str:
    return run_comparison.to_html([(name, decode(report)) for name, report in reports])


def plans(reports: list[tuple[str, dict[str, Any]]]) -> tuple[run_comparison.Plans, ...]:
    return run_comparison.plans([(name, decode(report)) for name, report in reports])


REPORT: dict[str, Any] = to_report(fake_results(evaluations=3))


def changed(**values: Any) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    for path, value in values.items():
        at = report["targets"]["x86"]
        *inner, last = path.split("__")
        for key in inner:
            at = at[key]
        at[last] = value
    return report


def grouped(*reports: dict[str, Any]) -> tuple[run_comparison.Group, ...]:
    return groups(run_comparison._entries([(f"run{i}", decode(report)) for i, report in enumerate(reports)]))


def column(group: run_comparison.Group, name: str) -> list[run_comparison.Cell]:
    return [cells[group.head.index(name)] for _, cells in group.rows]


# --- what may be compared ---------------------------------------------------------------------------------------------


def test_artifacts_on_other_images_or_another_machine_are_groups_of_their_own() -> None:
    data = copy.deepcopy(REPORT)
    data["data"] |= {"sha256": "00" * 32, "name": "other"}
    board = changed(latency__device="board")
    cpu = changed(latency__environment={**REPORT["targets"]["x86"]["latency"]["environment"], "cpu": "another"})
    threads = changed(latency__threads=4)
    assert [len(group.rows) for group in grouped(REPORT, data, board, cpu, threads, REPORT)] == [2, 1, 1, 1, 1]
    assert len({group.uid for group in grouped(REPORT, data, board)}) == 3


def test_the_best_of_a_column_is_marked_and_a_draw_is_not() -> None:
    better = changed(accuracy__top1=91.5, accuracy__drop_pp=0.3, latency__speedup={"median": 3.0, "ci95": [2.9, 3.1]})
    (group,) = grouped(REPORT, better)
    for name in ("top-1, %", "points lost", "speedup"):
        assert [cell.best for cell in column(group, name)] == [False, True]
    for name in ("size", "MACs", "parameters", "gates"):
        assert not any(cell.best for cell in column(group, name))
    smaller = changed(artifact__size_bytes=1000)
    assert [cell.best for cell in column(grouped(REPORT, smaller, smaller)[0], "size")] == [False, True, True]
    assert not any(cell.best for _, cells in grouped(REPORT)[0].rows for cell in cells)  # alone it is the best of nothing


def test_a_latency_that_was_not_measured_is_labelled_never_best_and_not_drawn() -> None:
    emulated = changed(latency__kind="emulated", latency__artifact={"p50_ms": 0.001, "p90_ms": 0.001, "p99_ms": 0.001})
    (group,) = grouped(REPORT, emulated)
    latencies = column(group, "median latency, ms")
    assert latencies[1].text == "0.001 (emulated)"
    assert not any(cell.best for cell in (*latencies, *column(group, "speedup")))
    assert "Not drawn, for lack of a measured latency: run1 (latency emulated)" in group.caption
    drawn = str(group.plot).partition("</desc>")[2]
    assert "run0, " in drawn
    assert "run1" not in drawn
    (alone,) = grouped(emulated)
    assert alone.plot is None
    assert alone.caption.startswith("Nothing was measured here.")


def test_a_target_without_an_artifact_is_named_and_compared_with_nothing() -> None:
    report = copy.deepcopy(REPORT)
    nothing = {"artifact": None, "status": "not_built", "verdict": {"passed": False, "reasons": ["no TensorRT here"]}}
    report["targets"]["jetson"] = report["targets"]["x86"] | nothing
    page = to_html([("a", report), ("b", REPORT)])
    assert "No artifact: a (jetson): no TensorRT here" in page
    assert "2 of 3 artifacts passed" in page


# --- the plot ---------------------------------------------------------------------------------------------------------

points = st.lists(
    st.builds(Point, st.just("p"), st.floats(0.1, 9), st.none(), st.floats(1, 99), st.just((0.0, 100.0)), st.just(1)),
    min_size=1,
    max_size=12,
)


@given(points)
def test_on_the_front_is_exactly_what_nothing_beats(found: list[Point]) -> None:
    def beaten(a: Point) -> bool:
        return any(b.latency <= a.latency and b.value >= a.value and (b.latency, b.value) != (a.latency, a.value) for b in found)

    assert set(front(found)) == {i for i, point in enumerate(found) if not beaten(point)}


def test_the_area_of_a_marker_is_the_files_size_and_bars_are_drawn_for_both_axes() -> None:
    from edge_compress.pipeline.report.plots import svg as plots

    drawn: list[dict[str, Any]] = []
    axes_of = plots.new_axes

    @contextmanager
    def spying(height: float) -> Any:
        with axes_of(height) as (figure, axes):
            errorbar = axes.errorbar
            axes.errorbar = lambda *args, **kwargs: (drawn.append(kwargs), errorbar(*args, **kwargs))
            yield figure, axes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "new_axes", spying)
        plot(
            [
                Point("large", 2.0, (1.9, 2.1), 90.0, (89.0, 91.0), 4_000_000),
                Point("small", 1.0, None, 89.0, (88.0, 89.5), 1_000_000),
            ],
            Label("p", "t", "d"),
        )
    assert (drawn[0]["ms"] / drawn[1]["ms"]) ** 2 == pytest.approx(4)
    np.testing.assert_allclose(drawn[0]["xerr"], [[0.1], [0.1]])
    np.testing.assert_allclose(drawn[1]["yerr"], [[1.0], [0.5]])
    assert drawn[1]["xerr"] is None


def test_a_plot_is_the_same_bytes_every_time_and_has_a_name() -> None:
    found = [Point("<script>", 1.0, (0.9, 1.1), 90.0, (89.0, 91.0), 1000), Point("dense", 2.0, None, 91.0, (90, 92), 9, True)]
    one, two = (plot(found, Label("p", "A & B", "what <it> shows")) for _ in range(2))
    assert one == two
    assert "<script>" not in one
    assert "A &amp; B" in one
    with pytest.raises(ValueError, match="no points"):
        plot([], Label("p", "t", "d"))


def test_the_dense_model_is_drawn_once_for_each_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Point]] = []
    monkeypatch.setattr(pareto, "plot", lambda found, *_: seen.append(list(found)) or "")
    other = copy.deepcopy(REPORT)
    other["targets"]["x86"]["artifact"]["baseline"]["sha256"] = "ff" * 32
    grouped(REPORT, REPORT, other)
    assert [point.dense for point in seen[0]] == [True, True, False, False, False]
    assert seen[0][0].value == REPORT["targets"]["x86"]["accuracy"]["dense_value"]


# --- plans ------------------------------------------------------------------------------------------------------------


def test_where_plans_differ_is_shown_and_how_much_is_the_same_is_counted() -> None:
    other = copy.deepcopy(REPORT)
    knobs = {knob["name"]: knob for knob in other["pruned"]["knobs"]}
    knobs["conv1"]["kept"] = 3
    knobs["block:layer1.0.conv2"]["kept"] = 0
    (found,) = plans([("a", REPORT), ("b", other), ("c", REPORT)])
    assert found.runs == ("a", "b", "c")
    assert [row[0] for row in found.rows] == ["conv1", "block:layer1.0.conv2"]
    assert found.same == len(REPORT["pruned"]["knobs"]) - 2
    _, kind, cells = found.rows[0]
    assert kind == "stream"
    assert [cell.text for cell in cells] == ["14/16", "3/16", "14/16"]
    assert [cell.differs for cell in cells] == [False, True, False]
    assert [cell.text for cell in found.rows[1][2]] == ["kept", "removed", "kept"]


def test_networks_of_another_structure_are_not_laid_side_by_side() -> None:
    deeper = json.loads(json.dumps(to_report(fake_results(blocks=5, evaluations=3))))
    assert plans([("a", REPORT), ("b", deeper)]) == ()
    assert "No two of the runs prune networks of the same structure" in to_html([("a", REPORT), ("b", deeper)])
    assert [found.runs for found in plans([("a", REPORT), ("b", deeper), ("c", REPORT)])] == [("a", "c")]
    (same,) = plans([("a", REPORT), ("b", REPORT)])
    assert same.rows == ()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_runs_of_one_name_are_told_apart() -> None:
    page = to_html([("run", REPORT), ("run", REPORT)])
    assert "run, run #2" in page


def test_a_page_is_self_contained_and_nothing_from_outside_is_markup() -> None:
    evil = copy.deepcopy(REPORT)
    evil["model"]["name"] = "<img src=x onerror=alert(1)>"
    evil["data"]["name"] = "\"'><script>alert(1)</script>"
    evil["pruned"]["knobs"][0]["name"] = "</table><b>"
    evil["pruned"]["knobs"][0]["kept"] = 1
    plain = copy.deepcopy(evil)
    plain["pruned"]["knobs"][0]["kept"] = 2
    page = to_html([("<i>one</i>", evil), ("two", plain)])
    for text in ("<img", "<script", "<b>", "<i>", "http:", "https:"):
        assert text not in page.replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in page
    assert to_html([("<i>one</i>", evil), ("two", plain)]) == page


def test_many_runs_stay_under_the_limit_on_size() -> None:
    big = json.loads(json.dumps(to_report(fake_results(blocks=18, evaluations=200))))
    other = copy.deepcopy(big)
    for knob in other["pruned"]["knobs"]:
        knob["kept"] = max(1, knob["kept"] - 1)
    page = to_html([(f"run {i}", (big, other)[i % 2]) for i in range(12)])
    assert len(page.encode()) < 1_500_000
    assert len(re.findall(r"<th scope=\"row\">run \d+</th>", page)) == 12


def test_kinds_without_any_number_leave_a_dash() -> None:
    unknown = fake_target(Kind.MEASURED, accuracy=None, latency=None)
    report = json.loads(json.dumps(to_report(dataclasses.replace(fake_results(evaluations=3), targets={"x86": unknown}))))
    (group,) = grouped(report, report)
    assert [cell.text for cell in group.rows[0][1][:4]] == ["–"] * 4
