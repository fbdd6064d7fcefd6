"""Holds a report against itself: verdicts against figures and gates.

One that contradicts itself was changed, or judged by an earlier version's weaker gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..report.report import Report, TargetReport
from ..verify.gates import Allowed, judge

_ROUNDING = 1e-6  # of the larger value; JSON keeps every digit


def self_contradictions(report: Report, names: tuple[str, ...]) -> list[str]:
    """Returns what the report says of these targets, or of all together, and its own figures deny, a sentence each."""
    wrong = [f"{name}: {text}" for name in names for text in _of_target(report, report.targets[name])]
    if report.passed and (failed := [name for name, target in report.targets.items() if not target.verdict.passed]):
        wrong.append(f"the run is said to have passed, {', '.join(failed)} did not")
    return wrong


def _of_target(report: Report, target: TargetReport) -> Iterator[str]:
    accuracy, latency, artifact, gates = target.accuracy, target.latency, target.artifact, report.gates
    if accuracy is not None:
        dense = accuracy.dense_value or report.dense.value  # older reports do not repeat it
        drop = report.metric.drop(dense, accuracy.value)
        near = math.isclose(drop, accuracy.drop, abs_tol=_ROUNDING * max(abs(dense), abs(accuracy.value), 1e-9))
        if math.isfinite(drop) and not near:
            yield f"a drop of {accuracy.drop:g}, where {dense:g} before and {accuracy.value:g} now give {drop:g}"
    if not target.verdict.passed:
        return
    if target.status != "ok" or target.verdict.reasons or accuracy is None or latency is None or artifact is None:
        yield f"it is said to have passed, with {target.why if target.why != 'ok' else 'figures missing'}"
        return
    limits = Allowed(report.metric, gates.max_accuracy_drop, gates.min_speedup, gates.max_size_bytes)
    size_bytes, seen = artifact.size_bytes, target.on_device
    found = judge(limits, accuracy, latency, size_bytes=size_bytes, masked=report.masked, seen=seen)
    yield from (f"it is said to have passed, but {reason}" for reason in found.reasons)
