"""Collects the results of a run into its `Report`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib import metadata

from ...devices.measure.usage import Usage
from ...targets.base import Target
from ..config import Config
from ..run_context import RunContext
from ..types import Artifact, Candidate, Checkpoint, Kind, Knob, Plan, SearchResult, Sensitivity, Solved, TargetResult, Verdict
from ..verify.by_class import remarks
from ..verify.gates import Allowed
from ..verify.references import References
from .report import (
    Dense,
    Gates,
    Header,
    Kept,
    Named,
    Pruned,
    Refusal,
    Report,
    ReportedArtifact,
    ReportedFinalist,
    Search,
    TargetReport,
    Tool,
    Tried,
)

PACKAGES = ("edge-compress", "torch", "torchvision", "onnx", "onnxruntime", "stable-baselines3", "numpy", "safetensors")
_WITHIN = 0.98  # of the budget: what a long measurement may differ from the search's quick ones by


def header_of(run: RunContext, chosen: Sequence[Target], started: datetime) -> Header:
    """Identifies a run that has just ended: command, package versions and licences, inputs, times."""
    subject, packages = run.loaded.subject, packages_of(chosen)
    return Header(
        tool=Tool(packages["edge-compress"], packages, {name: _license_of(name) for name in packages}),
        model=Named(subject.model, subject.model_sha256),
        data=subject.data,
        preprocess=subject.preprocess,
        signature=subject.signature,
        metric=subject.metric,
        seed=run.config.seed,
        command=run.command or shlex.join(["edge-compress", *sys.argv[1:]]),
        started=started.isoformat(timespec="seconds"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def refusal_of(run: RunContext, chosen: Sequence[Target], reason: str, started: datetime) -> Refusal:
    """The report of a run whose network was refused before the search."""
    return Refusal(
        **vars(header_of(run, chosen, started)),
        dense=run.loaded.subject.cost,
        targets={target.name: TargetReport("failed", Verdict(False, (reason,))) for target in chosen},
        notes=tuple(run.notes),
    )


def report_of(
    run: RunContext,
    header: Header,
    references: References,
    gates: Allowed,
    targets: dict[str, TargetResult],
    *,
    plan: Plan,
    knobs: tuple[Knob, ...],
    ranking: Sensitivity,
    search: SearchResult,
    solved: Solved,
    checkpoint: Checkpoint,
    prunable_macs_share: float | None,
    usage: Mapping[str, Usage | None],
) -> Report:
    """The report of a run that has ended."""
    config = run.config
    baselines = [t.artifact.baseline for t in targets.values() if t.artifact is not None and t.artifact.baseline]
    masked = search.best.density is not None
    return Report(
        **vars(header),
        stage_seconds=run.seconds,
        gates=Gates(
            gates.max_drop,
            gates.min_speedup,
            gates.max_size,
            latency_budget=None if masked else search.budget,
            density_budget=search.budget if masked else None,
        ),
        passed=bool(targets) and all(t.verdict.passed for t in targets.values()),
        dense=Dense(
            **vars(run.loaded.subject.cost),
            value=references.dense,
            size_bytes=baselines[0].size_bytes if baselines else 0,
            search_value=references.dense_search,
        ),
        pruned=Pruned(
            **vars(checkpoint.cost),
            value=references.pruned,
            sparsity=checkpoint.sparsity,
            pattern=str(plan.pattern),
            score=plan.score,
            search=_search(search, solved),
            knobs=tuple(_kept(i, knob, plan, search, ranking) for i, knob in enumerate(knobs)),
            thresholds=plan.removed_share,
            finetune=checkpoint.history,
            state=checkpoint.state,
            masks=plan.masks,
            prunable_macs_share=prunable_macs_share,
        ),
        targets={name: _target(result, usage.get(name)) for name, result in targets.items()},
        notes=(*run.notes, *_on_budget(config, search, targets), *_on_classes(targets)),
    )


def _search(search: SearchResult, solved: Solved) -> Search:
    return Search(
        method=search.method,
        evaluations=search.evaluations,
        seconds=search.seconds,
        best=_tried(search.best),
        tried=tuple(_tried(c, reward) for c, reward in zip(search.tried, search.rewards, strict=True)),
        best_index=next((i for i, c in enumerate(search.tried) if c.levels == search.best.levels), None),
        latency_reused=search.latency_reused,
        latency_measured=search.latency_measured,
        table_error=search.table_error,
        notes=search.notes,
        finalists=tuple(
            ReportedFinalist(f.candidate.levels, f.candidate.accuracy, f.accuracy, i == solved.taken)
            for i, f in enumerate(solved.finalists)
        ),
    )


def _tried(candidate: Candidate, reward: float | None = None) -> Tried:
    found = {name: value for name, value in vars(candidate).items() if name != "cost"}
    if candidate.latency_kind is Kind.NONE:
        found["latency_ratio"] = None
    return Tried(**vars(candidate.cost), **found, reward=reward)


def _kept(index: int, knob: Knob, plan: Plan, search: SearchResult, ranking: Sensitivity) -> Kept:
    """What stays of one knob's units, and if nothing does because its whole block is gone, that block."""
    if knob.name in plan.removed_blocks:
        kept = 0
    elif knob.name in plan.kept:
        kept = len(plan.kept[knob.name])
    else:
        kept = round(knob.size * (1.0 - plan.removed_share.get(knob.name, 0.0)))
    gone = knob.block if knob.block in plan.removed_blocks else None
    saved = search.savings[index][search.best.levels[index]] if search.savings else None
    score = sum(ranking.shares[knob.name][kept:]) if knob.name in ranking.shares else None
    kept, saved, score = (0, None, None) if gone else (kept, saved, score)
    return Kept(knob.name, knob.kind, knob.size, kept, kept / knob.size, gone, saved, score)


def _target(result: TargetResult, usage: Usage | None) -> TargetReport:
    accuracy, latency = result.accuracy, result.latency
    return TargetReport(
        status=result.status,
        verdict=result.verdict,
        artifact=_reported(result.artifact) if result.artifact else None,
        accuracy=None if accuracy is None or accuracy.kind is Kind.NONE else accuracy,
        latency=None if latency is None or latency.kind is Kind.NONE else latency,
        golden=result.golden,
        on_device=result.on_device,
        dense_form=result.artifact.dense_form if result.artifact else None,
        unpruned=result.unpruned,
        quantised=result.quantised,
        pictures=result.pictures,
        usage=usage,
    )


def _reported(artifact: Artifact) -> ReportedArtifact:
    """The artifact as the report has it: with its file's reference in place."""
    rest = {f.name: getattr(artifact, f.name) for f in fields(Artifact) if f.name not in ("file", "dense_form")}
    return ReportedArtifact(**vars(artifact.file), **rest)


def _on_budget(config: Config, search: SearchResult, results: dict[str, TargetResult]) -> Iterator[str]:
    """Notes on the budget: that it was no limit, or that an artifact exceeds it."""
    limits = "latency" if search.best.density is None else "density"
    if config.reward == "soft":
        yield f"The reward was soft ({config.alpha:g} x accuracy - {config.beta:g} x {limits}): the budget was no limit."
    elif limits == "latency":
        for name, result in results.items():
            if result.latency is not None and result.latency.speedup.median * search.budget < _WITHIN:
                ratio = 1.0 / result.latency.speedup.median
                yield f"{name}: the artifact takes {ratio:.3f} of the dense latency, more than the budget of {search.budget:.3f}."


def _on_classes(results: dict[str, TargetResult]) -> Iterator[str]:
    """Notes on classes that lost much more than the average says."""
    for name, result in results.items():
        if result.accuracy is not None:
            yield from remarks(name, result.accuracy.classes)


def packages_of(chosen: Sequence[Target]) -> dict[str, str]:
    """Name -> version of the packages that a run for some targets uses."""
    own = [name for target in chosen for name in target.packages]
    return {name: metadata.version(name) for name in dict.fromkeys((*PACKAGES, *own))}


def _license_of(package: str) -> str:
    """A package's licence: its SPDX expression, else the words of its classifiers or of its field; "" where it states none."""
    about = metadata.metadata(package)
    named = [text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or () if text.startswith("License :: OSI")]
    expression, said = (next(iter(about.get_all(key) or ()), "") for key in ("License-Expression", "License"))
    return expression or " AND ".join(named) or (said if len(said) < 100 and "\n" not in said else "")
