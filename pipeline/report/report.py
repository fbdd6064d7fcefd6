"""Pure functions from results to documents: `report.json`, and from that alone `report.md` and `report.html`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from ..codec import to_json
from ..types import (
    Accuracy,
    Candidate,
    Checkpoint,
    Kind,
    Knob,
    Plan,
    SearchResult,
    Solved,
    Subject,
    TargetResult,
    Timing,
)
from .figures import figures
from .markdown import md, md_table
from .rendering import render
from .words import (
    Json,
    comparison,
    conversion,
    environment,
    finetune_table,
    headline,
    how_measured,
    kept_table,
    moment,
    verdict_line,
)


@dataclass(frozen=True)
class RunResults:
    """What one run produced: all that a report is made of."""

    subject: Subject
    seed: int
    dense_top1: float  # percent, PyTorch, test split
    dense_search_top1: float  # percent, PyTorch, search split
    dense_size_bytes: int
    plan: Plan
    knobs: tuple[Knob, ...]
    search: SearchResult
    solved: Solved
    checkpoint: Checkpoint
    pruned_top1: float  # percent, PyTorch, test split
    targets: dict[str, TargetResult]
    max_accuracy_drop: float  # gate, percentage points
    min_speedup: float  # gate, lower end of the 95 % interval
    command: str
    packages: dict[str, str]
    started: str  # ISO 8601
    finished: str
    stage_seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    max_size_bytes: int | None = None  # gate, of the artifact's file
    licenses: dict[str, str] = field(default_factory=dict)  # package -> what it says of its licence, "" where nothing


def to_report(results: RunResults) -> Json:
    """`report.json`: JSON types only, every key of the public contract and more beside them.

    A latency or an accuracy of kind `none`, or one that is missing, keeps its keys with `null` in them.
    """
    subject, plan, search, checkpoint = results.subject, results.plan, results.search, results.checkpoint
    version = results.packages.get("edge-compress") or metadata.version("edge-compress")
    report: Json = _finite(
        {
            "schema": 1,
            "tool": {"version": version, "packages": dict(results.packages), "licenses": dict(results.licenses)},
            "model": {"name": subject.model, "sha256": subject.model_sha256},
            "data": to_json(subject.data),
            "preprocess": to_json(subject.preprocess),
            "seed": results.seed,
            "command": results.command,
            "started": results.started,
            "finished": results.finished,
            "stage_seconds": dict(results.stage_seconds),
            "notes": list(results.notes),
            "gates": {
                "max_accuracy_drop": results.max_accuracy_drop,
                "min_speedup": results.min_speedup,
                "max_size_bytes": results.max_size_bytes,
                "latency_budget": search.budget if search.best.density is None else None,
                "density_budget": None if search.best.density is None else search.budget,
            },
            "passed": bool(results.targets) and all(t.verdict.passed for t in results.targets.values()),
            "dense": {
                "top1": results.dense_top1,
                "search_top1": results.dense_search_top1,
                **to_json(subject.cost),
                "size_bytes": results.dense_size_bytes,
            },
            "pruned": {
                "top1": results.pruned_top1,
                **to_json(checkpoint.cost),
                "sparsity": checkpoint.sparsity,
                "pattern": str(plan.pattern),
                "score": plan.score,
                "search": _search_json(search, results.solved),
                "knobs": [_knob_json(k, plan) for k in results.knobs],
                "thresholds": dict(plan.thresholds),
                "masks": to_json(plan.masks),
                "finetune": to_json(checkpoint.history),
                "state": to_json(checkpoint.state),
            },
            "targets": {name: _target_json(t) for name, t in results.targets.items()},
        }
    )
    return report


def _search_json(search: SearchResult, solved: Solved) -> Json:
    tried = [{**_candidate_json(c), "reward": r} for c, r in zip(search.tried, search.rewards, strict=True)]
    chosen = next((i for i, c in enumerate(search.tried) if c.levels == search.best.levels), None)
    return {
        "method": search.method,
        "evaluations": search.evaluations,
        "seconds": search.seconds,
        "latency_reused": search.latency_reused,
        "latency_measured": search.latency_measured,
        "table_error": search.table_error,
        "notes": list(search.notes),
        "best": _candidate_json(search.best),
        "best_index": chosen,
        "finalists": [
            {
                "levels": list(f.candidate.levels),
                "accuracy": f.candidate.accuracy,
                "solved": f.accuracy,
                "taken": i == solved.taken,
            }
            for i, f in enumerate(solved.finalists)
        ],
        "tried": tried,
    }


def _candidate_json(candidate: Candidate) -> Json:
    data: Json = to_json(candidate)
    cost = data.pop("cost")
    if candidate.latency_kind is Kind.NONE:
        data["latency_ratio"] = None
    return {**data, **cost}


def _knob_json(knob: Knob, plan: Plan) -> Json:
    """What stays of one knob's units, and if nothing does because its whole block is gone, that block."""
    if knob.name in plan.removed_blocks:
        kept = 0
    elif knob.name in plan.kept:
        kept = len(plan.kept[knob.name])
    else:
        kept = round(knob.size * (1.0 - plan.thresholds.get(knob.name, 0.0)))
    # A block is named after its branch's last layer; what lies in the same module went with it.
    parents = {block: block.removeprefix("block:").rpartition(".")[0] for block in plan.removed_blocks}
    inside = (b for b, parent in parents.items() if parent and knob.name.startswith(f"{parent}."))
    gone = next(inside, None) if knob.kind == "inner" else None
    kept = 0 if gone else kept
    return {"name": knob.name, "kind": knob.kind, "size": knob.size, "kept": kept, "share": kept / knob.size, "block": gone}


def _target_json(target: TargetResult) -> Json:
    artifact = form = None
    if target.artifact is not None:
        data: Json = to_json(target.artifact)
        form = data.pop("dense_form")
        artifact = {**data.pop("file"), **data}
    return {
        "status": target.status,
        "artifact": artifact,
        "accuracy": _numbers_json(Accuracy, target.accuracy, ()),
        "latency": {**_numbers_json(Timing, target.latency, ("device",)), "baseline": form},
        "golden": to_json(target.golden),
        "on_device": to_json(target.on_device),
        "verdict": to_json(target.verdict),
    }


def _numbers_json(cls: type[Accuracy] | type[Timing], value: Accuracy | Timing | None, words: tuple[str, ...]) -> Json:
    if value is not None and value.kind is not Kind.NONE:
        data: Json = to_json(value)
        return data
    empty: Json = dict.fromkeys(cls.__dataclass_fields__)
    return {**empty, **{w: getattr(value, w, None) for w in words}, "kind": str(Kind.NONE)}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_html(report: Json) -> str:
    """`report.html`: one self-contained page from `report.json` alone; everything from outside is escaped."""
    built = [name for name, target in report["targets"].items() if target["artifact"] is not None]
    return render(
        "report.html.jinja",
        report=report,
        verdict=verdict_line(report),
        headlines=[headline(report, name) for name in report["targets"]],
        finished=moment(report["finished"]),
        plots=figures(report),
        comparisons=[comparison(report, name) for name in built or [*report["targets"]][:1]],
        details=[t for name in report["targets"] for t in (how_measured(report, name), conversion(report, name)) if t],
        environment=environment(report),
    )


def to_markdown(report: Json) -> str:
    """`report.md`: the verdict, the tables and the command, from `report.json` alone."""
    lines = [f"# {md(verdict_line(report))}", "", md(f"{report['model']['name']} on {report['data']['name']}"), ""]
    for name in report["targets"]:
        head = headline(report, name)
        lines += [f"## {md(name)}: {head.state}", "", md(head.sentence), ""]
        lines += [f"- {md(reason)}" for reason in head.reasons] + [f"- {tip}" for tip in head.advice]
        lines += [""] if head.reasons or head.advice else []
        for table in (comparison(report, name), how_measured(report, name), conversion(report, name)):
            lines += md_table(table) if table else []
    lines += ["## What was removed", "", *md_table(kept_table(report)), *md_table(finetune_table(report))]
    lines += ["## The run", ""]
    for table in environment(report):
        lines += md_table(table)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", report["command"])), default=0))
    return "\n".join([*lines, "The command:", "", f"{fence}sh", report["command"], fence, ""])
