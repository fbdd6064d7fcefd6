"""The search stage: what can go is ranked, then every knob is set within the budget on the device."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from ...devices.device import Device
from ...targets.base import Limits, Target
from ..codec import to_json
from ..config import Config
from ..evaluate.evaluation_context import Bench, open_bench
from ..evaluate.table_evaluator import table_error
from ..options import Pattern, Precision
from ..run_context import RunContext
from ..run_folder import Stage
from ..search.problem import SearchSettings
from ..search.search import search
from ..types import Baseline, Candidate, SearchResult, Sensitivity
from .base import Pruning, RankedEvaluator

SEARCH_SETTINGS = ("search", "evaluations", "latency_budget", "reward", "alpha", "beta", "seed")


def searched(
    run: RunContext,
    subject_key: str,
    pruning: Pruning,
    target: Target,
    precision: Precision,
    place: Device | None,
    limits: Limits,
    baseline: Baseline,
) -> tuple[SearchResult, Sensitivity, Stage]:
    """Rank what can go, then set every knob: the plans with the best one-shot accuracy within the budget."""
    config = run.config
    settings = {name: to_json(getattr(config, name)) for name in ("score", "lambda_", "seed")} | {"precision": str(precision)}
    settings |= {} if run.pattern is Pattern.CHANNEL else {"pattern": str(run.pattern)}
    ranking_stage = run.folder.stage("sensitivity", "5", settings, (subject_key,))
    ranking = ranking_stage.result(Sensitivity)
    settings = {n: to_json(getattr(config, n)) for n in SEARCH_SETTINGS}
    settings |= {"target": target.name, "precision": str(precision), "device": config.device, "threads": config.threads}
    settings |= {} if config.max_size is None else {"max_size": config.max_size}
    settings |= {"estimated": True} if place is None else {}
    settings |= {"baseline": baseline.form.form}
    settings |= {} if limits == target.limits else {"channel_multiple": limits.channel_multiple}
    stage = run.folder.stage("search", "8", settings, (ranking_stage.key,))
    found = stage.result(SearchResult)
    if ranking is None or found is None:
        memo = stage.folder / "evaluations.jsonl"
        estimated = place is None
        opening = open_bench(
            config,
            run.loaded,
            pruning.net,
            target,
            precision,
            memo,
            probed=pruning.prober,
            baseline=(run.folder.path / baseline.file.path).read_bytes(),
            form=baseline.form.form,
            device=place,
            estimated=estimated,
            compute=run.compute,
            note=stage.note,
        )
        with ExitStack() as stack:
            with run.stage("curvature"):
                bench = stack.enter_context(opening)
            evaluator = pruning.evaluator(bench)
            if ranking is None:
                with run.stage("sensitivity"):
                    ranking = evaluator.rank(config.lambda_)
                ranking_stage.finish(ranking)
            with run.stage("latency table"):
                evaluator.follow(ranking)
            found = _chosen(run, pruning, evaluator, _budget(config, bench))
            error = table_error(evaluator.latency_estimate, found.tried) if pruning.limits == "latency" else None
            found = replace(found, latency_reused=bench.reused, latency_measured=bench.measured, table_error=error)
        stage.finish(found)
    return found, ranking, stage


def _chosen(run: RunContext, pruning: Pruning, evaluator: RankedEvaluator, budget: float) -> SearchResult:
    config, best = run.config, 0.0
    of = "of dense" if pruning.limits == "latency" else "of the connections"

    def tell(candidate: Candidate, reward: float) -> None:
        nonlocal best
        best = max(best, reward)
        bar.advance(1, f"accuracy {candidate.accuracy:.3f} at {candidate.spent:.2f} {of}, best {best:.3f}")

    how = SearchSettings(
        config.search,
        config.evaluations,
        budget,
        mode=config.reward,
        alpha=config.alpha,
        beta=config.beta,
        seed=config.seed,
        limits=pruning.limits,
        max_size_bytes=config.max_size,
    )
    with run.stage("search"), run.ui.bar(config.search, config.evaluations) as bar:
        return search(evaluator, how, tell)


def _budget(config: Config, bench: Bench) -> float:
    """The budget as a share of the dense network's latency, or of its connections."""
    if config.latency_budget.ratio is not None:
        return config.latency_budget.ratio
    assert config.latency_budget.ms is not None  # Budget holds one of the two
    return config.latency_budget.ms / bench.meter.dense_ms
