"""Finalists: the search's best plans, re-ranked after sequential layer-wise reconstruction.

A search judges a plan by layers that were reconstructed independently on dense inputs: cheap, and blind to how errors accumulate.
After sequential reconstruction, each layer on the pruned layers' outputs before it, the same plans rank differently.
Twelve of ResNet-20 with 79.7 to 81.6 % by the search had 85.6 to 89.7 % then (`results/channels-resnet20.json`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from ..evaluate.evaluation_context import REWARD_SAMPLES, fewer_judged
from ..evaluate.reward_samples import reward_samples
from ..network.compute import CPU, Compute
from ..network.weights import save_weights
from ..reconstruct.memory import affordable, reduced
from ..run_context import RunContext
from ..run_folder import Stage
from ..search.problem import SearchSettings
from ..search.search_log import best_first
from ..task.load import Loaded
from ..task.samples import training_inputs
from ..types import Candidate, Finalist, Plan, SearchResult, Sensitivity, Solved
from .base import Pruning

SEQUENTIAL_SAMPLES = 1000  # samples a plan is solved on, layer after layer

Solve = Callable[[Candidate], nn.Module]
Judge = Callable[[nn.Module], tuple[float, float]]  # accuracy (share) and loss


def play_off(
    candidates: Sequence[Candidate],
    settings: SearchSettings,
    solve: Solve,
    judge: Judge,
    progress: Callable[[Finalist], None] | None = None,
) -> tuple[tuple[Finalist, ...], int, nn.Module]:
    """Reconstruct candidates sequentially and take the one that the search prefers by their accuracies then.

    Args:
        candidates: of one search, at least one. Their latencies stand, and all of them are allowed.
        settings: of that search; its mode decides what is best.
        solve: the network of a candidate.
        judge: what a network is worth, on the images that the search judged by.
        progress: told of each.

    Returns:
        The finalists in the order given, the position of the one taken, and its network.
    """
    within = replace(settings, budget=max(c.spent for c in candidates), max_size_bytes=None)
    found: list[Finalist] = []
    taken, kept = 0, None
    for candidate in candidates:
        net = solve(candidate)
        found.append(Finalist(candidate, *judge(net)))
        worth = [replace(f.candidate, accuracy=f.accuracy, loss=f.loss) for f in found]
        best = best_first(worth, within)[0]
        if kept is None or best is worth[-1]:
            taken, kept = len(found) - 1, net
        if progress is not None:
            progress(found[-1])
    assert kept is not None  # at least one
    return tuple(found), taken, kept


def judge_on(loaded: Loaded, count: int, compute: Compute = CPU) -> Judge:
    """Returns a judge by reward and loss, in float on the first samples of the search split."""
    reward = reward_samples(loaded, count, 0, compute)
    return lambda net: reward.judge(reward.answers(net))


def solve(
    run: RunContext, before: Stage, pruning: Pruning, found: SearchResult, ranking: Sensitivity
) -> tuple[SearchResult, Plan, Solved, Stage]:
    """The search's result with the finalist that was taken as its best, its plan, and its network ready for training."""
    candidates = found.finalists[: pruning.finalists]
    # what was found, not only how it was searched for: re-measured latencies may have led to other plans
    plans = [[list(c.levels), c.spent] for c in candidates]
    settings = {"samples": SEQUENTIAL_SAMPLES, "judged": REWARD_SAMPLES, "finalists": plans, "seed": run.config.seed}
    settings |= fewer_judged(run.loaded, run.compute)
    stage = run.folder.stage("compensate", "7", settings, (before.key,))
    solved = stage.result(Solved)
    if solved is None:
        data = run.loaded.data
        wanted, memory = min(SEQUENTIAL_SAMPLES, len(data.train)), run.compute.memory_bytes
        count = affordable(pruning.widest, wanted, memory)
        if note := reduced("Layer-wise reconstruction", count, wanted, memory):
            stage.note(note)
        inputs = training_inputs(data.train, count, run.config.seed + 1)

        def network(candidate: Candidate) -> nn.Module:
            return pruning.solved(pruning.plan(candidate.levels, ranking, before), inputs)

        how = SearchSettings(found.method, 1, found.budget, run.config.reward, run.config.alpha, run.config.beta)
        judge = judge_on(run.loaded, REWARD_SAMPLES, run.compute)
        with run.stage("compensate"), run.ui.bar("finalists", len(candidates)) as bar, stage.noting():

            def tell(done: Finalist) -> None:
                bar.advance(
                    1,
                    f"accuracy {done.candidate.accuracy:.3f} in the search, {done.accuracy:.3f} after sequential reconstruction",
                )

            finalists, taken, net = play_off(candidates, how, network, judge, tell)
        solved = Solved(finalists, taken, save_weights(stage, net))
        stage.finish(solved)
    best = solved.finalists[solved.taken].candidate
    return replace(found, best=best), pruning.plan(best.levels, ranking, before), solved, stage
