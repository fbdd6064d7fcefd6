"""A report whose verdicts its own figures deny was changed after the run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from edge_compress.pipeline.release.consistency import self_contradictions
from edge_compress.pipeline.report.report import TargetReport
from edge_compress.pipeline.types import Kind, Speedup, Verdict
from fake_run import fake_results, to_report

WHOLE = to_report(fake_results(evaluations=2))
X86 = WHOLE.targets["x86"]
replace = dataclasses.replace


def found(target: TargetReport = X86, **changes: Any) -> list[str]:
    return self_contradictions(replace(WHOLE, targets={"x86": target}, **changes), ("x86",))


def with_accuracy(**changes: Any) -> TargetReport:
    assert X86.accuracy is not None
    return replace(X86, accuracy=replace(X86.accuracy, **changes))


def with_latency(**changes: Any) -> TargetReport:
    assert X86.latency is not None
    return replace(X86, latency=replace(X86.latency, **changes))


def gates(**changes: Any) -> dict[str, Any]:
    return {"gates": replace(WHOLE.gates, **changes)}


def test_a_report_as_a_run_writes_it_agrees_with_itself() -> None:
    assert found() == []
    assert found(with_accuracy(dense_value=0.0)) == []  # an older one, which has the dense network's value in one place
    failed = replace(with_accuracy(value=51.8, drop=40.0), verdict=Verdict(False, ("accuracy: top-1 fell",)))
    assert found(failed, passed=False) == []
    unknown = replace(X86, status="not_built", verdict=Verdict(False, ("no board",)), latency=None)
    assert found(unknown, passed=False) == []
    assert found(replace(with_accuracy(value=math.nan, drop=math.nan), verdict=failed.verdict), passed=False) == []


@pytest.mark.parametrize(
    ("target", "changes", "told"),
    [
        (with_accuracy(value=51.8, drop=40.0), {}, "passed, but accuracy: top-1 fell by 40.00 points"),
        (with_accuracy(value=51.8), {}, "a drop of 0.62, where 91.8 before and 51.8 now give 40"),
        (with_accuracy(drop=math.nan), {}, "a drop of nan"),
        (with_latency(speedup=Speedup(1.1, (0.9, 1.2))), {}, "passed, but speedup: not real"),
        (with_latency(kind=Kind.ESTIMATED), {}, "passed, but latency: not measured"),
        (X86, gates(min_speedup=3.0), "passed, but speedup: lower end 2.25"),
        (X86, gates(max_size_bytes=10), "passed, but size: the file takes 181,403 bytes"),
        (replace(X86, latency=None), {}, "passed, with figures missing"),
        (replace(X86, status="failed"), {}, "passed, with failed"),
        (replace(X86, verdict=Verdict(True, ("accuracy: it fell",))), {}, "passed, with accuracy: it fell"),
        (replace(X86, verdict=Verdict(False, ("accuracy: it fell",))), {}, "the run is said to have passed, x86 did not"),
    ],
)
def test_a_verdict_that_the_figures_deny_is_found(target: TargetReport, changes: dict[str, Any], told: str) -> None:
    assert any(told in text for text in found(target, **changes))
