"""The search stage: what can go is ranked, then every knob is set within the budget on the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from ...devices.access import settings_of
from ...devices.device import Device
from ...targets.base import Limits, Target
from ..codec import to_json
from ..evaluate.evaluation_context import Bench, fewer_judged, open_bench
from ..evaluate.table_evaluator import table_error
from ..options import Budget, Pattern, Precision
from ..run_context import RunContext
from ..run_folder import Stage
from ..score.criteria import CURVED
from ..search.problem import Evaluator, SearchSettings
from ..search.search import search
from ..types import Baseline, Candidate, SearchResult, Sensitivity
from .base import Pruning, RankedEvaluator, prunable

SEARCH_SETTINGS = ("search", "evaluations", "reward", "alpha", "beta", "seed")


@dataclass(frozen=True)
class Searched:
    """What the search for one budget found, in its stage."""

    found: SearchResult
    ranking: Sensitivity
    stage: Stage


def searched(
    run: RunContext,
    budgets: Sequence[Budget],
    subject_key: str,
    pruning: Pruning,
    target: Target,
    precision: Precision,
    place: Device | None,
    limits: Limits,
    baseline: Baseline,
) -> list[Searched]:
    """Rank what can go; then, for each budget, set every knob: the plans with the best one-shot accuracy within it.

    The budgets share the scores, the latency table and the answers for candidates; each has `config.evaluations` of its own.
    """
    config = run.config
    settings = {name: to_json(getattr(config, name)) for name in ("score", "lambda_", "seed")} | {"precision": str(precision)}
    settings |= {} if run.pattern is Pattern.CHANNEL else {"pattern": str(run.pattern)}
    ranking_stage = run.folder.stage("sensitivity", "11", settings, (subject_key,))
    curved = {"score": config.score, "seed": config.seed, "pattern": str(run.pattern)}
    curvature = run.folder.stage("curvature", "1", curved, (subject_key,)) if config.score in CURVED else None
    ranking = ranking_stage.result(Sensitivity)
    settings = {"target": target.name, "precision": str(precision), "device": config.device, "threads": config.threads}
    settings |= {"seed": config.seed} | settings_of(place)
    settings |= {} if config.max_size is None else {"max_size": config.max_size}
    settings |= {"estimated": True} if place is None else {}
    settings |= {"baseline": baseline.form.form}
    settings |= {} if limits == target.limits else {"shared_multiple": limits.shared_multiple}
    settings |= fewer_judged(run.loaded, run.compute)
    candidates = run.folder.stage("candidates", "7", settings, (ranking_stage.key,))  # its folder keeps the answers
    settings = {name: to_json(getattr(config, name)) for name in SEARCH_SETTINGS}
    stages = [run.folder.stage("search", "16", settings | {"latency_budget": str(b)}, (candidates.key,)) for b in budgets]
    results = [stage.result(SearchResult) for stage in stages]
    if ranking is None or None in results:
        opening = open_bench(
            config,
            run.loaded,
            target,
            precision,
            candidates.folder / "evaluations.jsonl",
            probed=pruning.prober,
            baseline=(run.folder.path / baseline.file.path).read_bytes(),
            form=baseline.form.form,
            device=place,
            estimated=place is None,
            compute=run.compute,
            note=candidates.note,
        )
        for line in prunable(pruning):
            run.ui.say(f"  {line}")
        with ExitStack() as stack:
            stack.enter_context(candidates.noting())
            with run.stage("prepare search"):
                bench = stack.enter_context(opening)
            bench.curvature = curvature
            evaluator = pruning.evaluator(bench)
            if ranking is None:
                with run.stage("sensitivity"):
                    ranking = evaluator.rank(config.lambda_)
                ranking_stage.finish(ranking)
            with run.stage("latency table"):
                evaluator.follow(ranking)
            counted = (0, 0)  # latencies that earlier budgets' results have; the table's go to the first
            for i, (budget, stage) in enumerate(zip(budgets, stages, strict=True)):
                if results[i] is not None:
                    continue
                if len(budgets) > 1:
                    run.ui.say(f"budget {budget} ({i + 1} of {len(budgets)})")
                found = _chosen(run, pruning, evaluator, _share(budget, bench))
                error = table_error(evaluator.latency_estimate, found.tried) if pruning.limits == "latency" else None
                reused, measured = bench.reused - counted[0], bench.measured - counted[1]
                counted = (bench.reused, bench.measured)
                saved = savings(evaluator) if pruning.limits == "latency" else ()
                results[i] = replace(found, latency_reused=reused, latency_measured=measured, table_error=error, savings=saved)
                stage.finish(results[i])
    assert ranking is not None
    return [Searched(found, ranking, stage) for found, stage in zip(results, stages, strict=True) if found is not None]


def savings(evaluator: Evaluator) -> tuple[tuple[float, ...], ...]:
    """Per knob and level, the share of the dense latency that the knob alone saves by the latency table."""
    dense = (0,) * len(evaluator.knobs)
    whole = evaluator.latency_estimate(dense)

    def saved(knob: int, level: int) -> float:
        return (whole - evaluator.latency_estimate((*dense[:knob], level, *dense[knob + 1 :]))) / whole

    return tuple(tuple(saved(i, level) for level in range(len(k.kept))) for i, k in enumerate(evaluator.knobs))


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


def _share(budget: Budget, bench: Bench) -> float:
    """The budget as a share of the dense network's latency, or of its connections."""
    if budget.ratio is not None:
        return budget.ratio
    assert budget.ms is not None  # Budget holds one of the two
    return budget.ms / bench.meter.dense_ms
