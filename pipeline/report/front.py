"""The Pareto front of a run with several latency budgets: metric against measured latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..types import Kind, Speedup

if TYPE_CHECKING:
    from .report import Report, TargetReport


@dataclass(frozen=True)
class FrontPoint:
    """One budget's artifact for one target."""

    budget: str  # as given
    run: str  # folder of its run, relative to the whole run's
    target: str
    passed: bool  # all gates of the target
    taken: bool  # its run is the one that the whole run's report and artifacts are of
    kind: Kind  # of the value
    value: float | None = None  # of the metric, test split
    drop: float | None = None  # below the dense network's
    speedup: Speedup | None = None  # over the dense float baseline; None: not measured
    gain: Speedup | None = None  # over the dense network quantised
    size_bytes: int | None = None
    quality: tuple[str, ...] = ()  # flags of the latency measurement


def point_of(report: Report, target: str, budget: str, run: str, taken: bool) -> FrontPoint:
    """The point of one target's artifact in the report of one budget's run."""
    found = report.targets[target]
    accuracy, latency, alone = found.accuracy, found.latency, found.alone
    measured = latency is not None and latency.kind is Kind.MEASURED
    return FrontPoint(
        budget,
        run,
        target,
        found.verdict.passed,
        taken,
        accuracy.kind if accuracy else Kind.NONE,
        accuracy.value if accuracy else None,
        accuracy.drop if accuracy else None,
        latency.speedup if latency and measured else None,
        alone.gain if alone and measured else None,
        found.artifact.size_bytes if found.artifact else None,
        latency.quality if latency else (),
    )


def preferred(reports: Sequence[Report]) -> int:
    """Position of the fastest run that breaks no gate; where all do, of the one that loses least.

    How fast is told by the first target with a measured speedup, else by the search. As for the exit code, an engine that was
    not built breaks a gate only by its estimated accuracy.
    """

    def speed(report: Report) -> float:
        measured = (t.latency.speedup.median for t in report.targets.values() if t.latency and t.latency.kind is Kind.MEASURED)
        return next(measured, 1.0 / (report.pruned.search.best.latency_ratio or 1.0))

    def lost(report: Report) -> float:
        return max((t.accuracy.drop for t in report.targets.values() if t.accuracy), default=0.0)

    passed = [i for i, report in enumerate(reports) if not any(breaks_a_gate(t, report) for t in report.targets.values())]
    if passed:
        return max(passed, key=lambda i: speed(reports[i]))
    return min(range(len(reports)), key=lambda i: (lost(reports[i]), -speed(reports[i])))


def breaks_a_gate(target: TargetReport, report: Report) -> bool:
    """What `verify.engine.result.breaks_a_gate` says of a result, from the report alone."""
    if target.status == "not_built":
        return target.accuracy is None or not target.accuracy.drop <= report.gates.max_accuracy_drop
    return not target.verdict.passed
