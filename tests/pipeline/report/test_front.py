"""The front of several budgets: the fastest that passes is taken, and every point says what it is."""

from __future__ import annotations

from dataclasses import replace

from edge_compress.pipeline.report.format import DASH
from edge_compress.pipeline.report.front import point_of, preferred
from edge_compress.pipeline.report.pages import to_html, to_markdown
from edge_compress.pipeline.report.report import Report, decode, encode
from edge_compress.pipeline.types import Kind, Speedup, Verdict
from fake_run import fake_results, fake_target, fake_timing, to_report


def run(speedup: float, drop: float, passed: bool = True, kind: Kind = Kind.MEASURED) -> Report:
    latency = fake_timing(kind, speedup=Speedup(speedup, (speedup - 0.1, speedup + 0.1)))
    target = fake_target(latency=latency, verdict=Verdict(passed))
    assert target.accuracy is not None
    target = replace(target, accuracy=replace(target.accuracy, drop=drop))
    return to_report(fake_results(evaluations=2, targets={"x86": target}))


def test_the_fastest_that_passes_is_taken_and_without_one_the_one_that_loses_least() -> None:
    assert preferred([run(1.5, 0.1), run(2.5, 0.6), run(4.0, 3.0, passed=False)]) == 1
    assert preferred([run(1.5, 1.4, passed=False), run(2.5, 1.2, passed=False)]) == 1
    assert preferred([run(1.5, 1.2, passed=False), run(2.5, 1.2, passed=False)]) == 1  # the faster of two alike


def test_an_engine_that_was_not_built_counts_by_its_estimated_accuracy_as_for_the_exit_code() -> None:
    def unbuilt(ratio: float, drop: float) -> Report:
        report = run(1.0, drop, passed=False)
        target = replace(report.targets["x86"], status="not_built", latency=None)
        best = replace(report.pruned.search.best, latency_ratio=ratio, latency_kind=Kind.ESTIMATED)
        pruned = replace(report.pruned, search=replace(report.pruned.search, best=best))
        return replace(report, targets={"jetson": target}, pruned=pruned, passed=False)

    most = run(1.0, 0.0).gates.max_accuracy_drop
    assert preferred([unbuilt(0.7, 0.1 * most), unbuilt(0.5, 0.6 * most), unbuilt(0.3, 3.0 * most)]) == 1
    assert preferred([unbuilt(0.5, 1.4 * most), unbuilt(0.3, 1.2 * most)]) == 1
    without = replace(unbuilt(0.3, 0.0).targets["jetson"], accuracy=None)
    assert preferred([unbuilt(0.7, 0.1 * most), replace(unbuilt(0.3, 0.0), targets={"jetson": without})]) == 0


def test_a_latency_that_was_not_measured_is_no_speedup() -> None:
    point = point_of(run(2.0, 0.1, kind=Kind.EMULATED), "x86", "0.5", "budgets/0.5", True)
    assert (point.speedup, point.gain) == (None, None)
    assert point.value is not None


def test_the_pages_show_every_budget_and_report_json_reads_back() -> None:
    reports = {"0.7": run(1.5, 0.1), "0.3": run(2.5, 2.0, passed=False)}
    points = [point_of(r, "x86", budget, f"budgets/{budget}", budget == "0.7") for budget, r in reports.items()]
    whole = replace(reports["0.7"], front=tuple(points))
    assert decode(encode(whole)) == whole
    for page in (to_html(whole), to_markdown(whole)):
        for text in ("budgets/0.7", "budgets/0.3", "0.7 (fastest that passes)", "dense, float", "1.50×", "2.50×", "failed"):
            assert text in page, text
    assert 'id="figure-front-0"' in to_html(whole)
    assert "front-0" not in to_html(reports["0.7"])
    unmeasured = replace(whole, front=tuple(replace(p, speedup=None) for p in points))
    assert "front-0" not in to_html(unmeasured)
    assert DASH in to_markdown(unmeasured)
