"""PPO beside uniform, random and knapsack search, at equal evaluations, on one network and this machine's latency.

    python benchmarks/search.py --model resnet_cifar.py:resnet20 --weights resnet20.pt --data npz:cifar.npz \
        --latency-budget 0.35 --work runs/search20 --out benchmarks/results/search-resnet20.json

Every method asks the same evaluator: a candidate's one-shot accuracy on 1,000 images of the search split, int8 in ONNX Runtime,
and its latency measured interleaved with the dense float model. `ppo` starts at the knapsack's plan, found with the first part of
its own evaluations; `ppo-cold` starts from nothing. A candidate's answer is the same for every method and seed (kept in `--work`,
so that the benchmark resumes), and each method pays for every distinct setting it asks for.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from pathlib import Path

import click
import numpy as np
import torch
from classifier import int8_bench, units_way
from edge_compress import targets
from edge_compress.devices.local import describe
from edge_compress.pipeline import config as settings
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.search.problem import SearchSettings
from edge_compress.pipeline.search.search import search
from edge_compress.pipeline.task.load import load_subject
from edge_compress.pipeline.types import Candidate, SearchResult

METHODS = ("ppo", "ppo-cold", "knapsack", "random", "uniform")


def row(method: str, seed: int, found: SearchResult) -> dict[str, object]:
    """A search as JSON: its result, and the best reward after each evaluation."""
    return {
        "method": method,
        "seed": seed,
        "evaluations": found.evaluations,
        "reward": max(found.rewards),
        "accuracy": found.best.accuracy,
        "latency_ratio": found.best.latency_ratio,
        "latency_kind": str(found.best.latency_kind),
        "best_so_far": [round(float(v), 4) for v in np.maximum.accumulate(found.rewards)],
    }


def summary(rows: list[dict[str, object]]) -> list[str]:
    """A Markdown table: the best reward after a quarter, half and all of the evaluations, mean and spread over seeds."""
    lines = ["| method | after a quarter | after half | at the end | worst seed |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(str(r["method"]) for r in rows):
        curves = [np.array(r["best_so_far"]) for r in rows if r["method"] == method]
        cells = []
        for share in (0.25, 0.5, 1.0):
            values = [float(c[max(0, int(len(c) * share) - 1)]) for c in curves]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}")
        lines.append(f"| {method} | {' | '.join(cells)} | {min(float(c[-1]) for c in curves):.3f} |")
    return lines


@click.command(help=__doc__)
@click.option("--model", default="digits-resnet", show_default=True, help="As in edge-compress.")
@click.option("--weights", default=None, help="As in edge-compress.")
@click.option("--data", default="digits", show_default=True, help="As in edge-compress.")
@click.option("--latency-budget", default="0.35", show_default=True, help="Share of the dense float latency.")
@click.option("--evaluations", default=200, show_default=True, help="Distinct candidates each search may ask for.")
@click.option("--seeds", default="0,1,2,3,4", show_default=True, help="Of the searches.")
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Which of them.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of kept answers.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON to write.")
def main(
    model: str,
    weights: str | None,
    data: str,
    latency_budget: str,
    evaluations: int,
    seeds: str,
    methods: str,
    work: Path,
    out: Path,
) -> None:
    """Run the searches."""
    flags = {"targets": ("x86",), "model": model, "weights": weights, "data": data, "latency_budget": latency_budget}
    config = settings.load(None, flags)
    if config.budget.ratio is None:
        raise click.UsageError("--latency-budget: a share such as 0.35")
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    ui, names = Progress(), methods.split(",")
    if unknown := set(names) - set(METHODS):
        raise click.UsageError(f"--methods: {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}")
    ui.say("ranking units ...")
    loaded, target = load_subject(config), targets.load("x86")
    way = units_way(config, loaded, target)
    rows: list[dict[str, object]] = []
    with int8_bench(config, loaded, way, target, work) as bench:
        evaluator = way.evaluator(bench)
        ranking = evaluator.rank(None)
        evaluator.follow(ranking)
        for seed in map(int, seeds.split(",")):
            for name in names:
                how = SearchSettings(
                    name.removesuffix("-cold"),
                    evaluations,
                    config.budget.ratio,
                    seed=seed,
                    warm_start=not name.endswith("-cold"),
                )
                with ui.bar(f"{name}, seed {seed}", evaluations) as bar:

                    def tell(candidate: Candidate, reward: float) -> None:
                        bar.advance(1, f"reward {reward:.3f}")

                    rows.append(row(name, seed, search(evaluator, how, tell)))
                seconds = [json.loads(line)["seconds"] for line in bench.memo.read_text(encoding="utf-8").splitlines()]
                report = {
                    "command": shlex.join(["python", "benchmarks/search.py", *sys.argv[1:]]),
                    "budget": config.budget.ratio,
                    "lambda": ranking.lambda_,
                    "machine": describe("onnxruntime"),
                    "candidates": len(seconds),
                    "candidate_seconds": {"median": statistics.median(seconds), "mean": statistics.mean(seconds)},
                    "rows": rows,
                }
                atomic_write(out, json.dumps(report, indent=1) + "\n")
    click.echo("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
