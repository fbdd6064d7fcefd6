"""The methods of the table without training: masks, re-solved weights, and the search for how much each layer loses.

Every method of one seed gets the same training images, varied as in training, and ends with BatchNorm statistics taken on them.
What is tuned (lambda, allocation) is tuned on the search split.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.reconstruct import optimal_brain_surgeon as obs
from edge_compress.pipeline.score import criteria as hasa
from edge_compress.pipeline.score.mask_knobs import density
from edge_compress.pipeline.score.masks import weight_masks
from edge_compress.pipeline.search.problem import SearchSettings
from edge_compress.pipeline.search.search import search
from edge_compress.pipeline.search.search_log import Hints
from edge_compress.pipeline.types import Candidate, Knob
from oracles import dearest
from safetensors import safe_open
from safetensors.torch import save
from table1_bench import TUNING_IMAGES, Bench, Masks, Pruned
from torch import Tensor


def by_score(score: str, *, uniform: bool = False) -> Callable[[Bench, float], Pruned]:
    """Zeros where a score without lambda is lowest: over all layers, or with the same share in each."""

    def method(bench: Bench, sparsity: float) -> Pruned:
        scores = bench.own(bench.scores(score).at(0.0))
        masks = weight_masks(scores, dict.fromkeys(scores, sparsity) if uniform else sparsity)
        return Pruned(bench.masked(masks), masks)

    return method


def published(bench: Bench, sparsity: float) -> Pruned:
    """`|w| exp(-lambda |h|)` over all layers, lambda > 0 (0 is `magnitude`, a row of its own) by the loss on the search split."""
    scores = bench.scores("published")

    def prune(lam: float) -> Masks:
        return weight_masks(bench.own(scores.at(lam)), sparsity)

    grid = [lam for lam in scores.grid() if lam > 0]
    best, _ = hasa.tune_lambda(lambda lam: -bench.divergence(bench.masked(prune(lam), TUNING_IMAGES)), grid)
    masks = prune(best)
    return Pruned(bench.masked(masks), masks, {"lambda": best})


def scored_masks(bench: Bench, sparsity: float) -> tuple[Masks, float]:
    """The score `hasa` within layers, each losing what magnitude over all layers takes from it; lambda by the search split."""
    whole = weight_masks({name: w.abs() for name, w in bench.weights.items()}, sparsity)
    shares = {name: 1.0 - int(mask.sum()) / mask.numel() for name, mask in whole.items()}
    scores = bench.scores("hasa")

    def prune(lam: float) -> Masks:
        return weight_masks(bench.own(scores.at(lam)), shares)

    best, _ = hasa.tune_lambda(lambda lam: -bench.divergence(bench.masked(prune(lam), TUNING_IMAGES)), scores.grid())
    return prune(best), best


def score_alone(bench: Bench, sparsity: float) -> Pruned:
    """Score and BatchNorm."""
    masks, lam = scored_masks(bench, sparsity)
    return Pruned(bench.masked(masks), masks, {"lambda": lam})


def score_compensated(bench: Bench, sparsity: float) -> Pruned:
    """Score and sequential compensation."""
    masks, lam = scored_masks(bench, sparsity)
    found = bench.compensated(masks, choose=False)
    return Pruned(found.net, found.masks, {"lambda": lam})


def losses(knobs: Sequence[Knob], costs: Mapping[str, Tensor]) -> tuple[np.ndarray, ...]:
    """Per knob and level the summed cost of what is gone: what the search starts from."""
    found = []
    for knob in knobs:
        total = np.concatenate([[0.0], costs[knob.name].flatten().sort().values.cumsum(0).numpy()])
        found.append(np.array([total[knob.size - kept] for kept in knob.kept]))
    return tuple(found)


def allocation(bench: Bench, sparsity: float) -> tuple[dict[str, int], Candidate]:
    """How many connections each layer keeps: PPO, by the loss on the search split.

    It begins with what magnitude over all layers keeps, what the removal costs over all layers keep, and what lies between.
    """
    share = 1.0 - sparsity
    whole = weight_masks({name: w.abs() for name, w in bench.weights.items()}, sparsity)
    by_magnitude = {name: int(mask.sum()) for name, mask in whole.items()}
    by_cost = dearest(bench.costs, share)
    between = {name: math.sqrt(max(by_magnitude[name], 1) * max(by_cost[name], 1)) for name in by_cost}
    plans = tuple(within(bench.knobs, counts, share) for counts in (between, by_magnitude, by_cost))
    settings = SearchSettings("ppo", bench.evaluations, share, seed=bench.seed, limits="density")

    def tell(candidate: Candidate, reward: float) -> None:
        bench.tell(f"allocation: loss {candidate.loss:.3f} at {candidate.spent:.3f} of the connections")

    found = search(bench.evaluator, settings, tell, Hints(plans, losses(bench.knobs, bench.costs)))
    affordable = [c for c in found.tried if c.spent <= share * 1.02] or [found.best]
    best = min(affordable, key=lambda c: c.loss)
    return exactly({k.name: (k.kept[level], k.size) for k, level in zip(bench.knobs, best.levels, strict=True)}, share), best


def within(knobs: Sequence[Knob], counts: Mapping[str, float], share: float) -> tuple[int, ...]:
    """Levels in the proportions of these counts, as dense as the budget lets them be."""
    sizes = np.array([knob.size for knob in knobs])
    found = tuple(len(knob.kept) - 1 for knob in knobs)
    for factor in np.geomspace(0.5, 1.5, 200):
        levels = tuple(knob.level(1.0 - factor * counts[knob.name] / knob.size) for knob in knobs)
        if sum(k.kept[level] for k, level in zip(knobs, levels, strict=True)) <= share * sizes.sum():
            found = levels
    return found


def exactly(kept: Mapping[str, tuple[float, int]], share: float) -> dict[str, int]:
    """Counts in the proportions of a setting that keep just this share of all connections: what levels leave open is scaled.

    Args:
        kept: layer -> (count, size).
        share: of all connections.
    """
    wanted = round(share * sum(size for _, size in kept.values()))

    def scaled(factor: float) -> dict[str, int]:
        return {name: min(size, round(count * factor)) for name, (count, size) in kept.items()}

    low, high = 0.0, max(size / count for count, size in kept.values())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scaled(middle).values()) <= wanted else (low, middle)
    counts = scaled(low)
    for name, (_, size) in sorted(kept.items(), key=lambda item: -item[1][1]):  # rounding leaves a few
        counts[name] += max(0, min(wanted - sum(counts.values()), size - counts[name]))
    return counts


def amp_hasa(bench: Bench, sparsity: float) -> Pruned:
    """Allocation by search, order within a layer by Optimal Brain Surgeon, sequential compensation."""
    counts, best = allocation(bench, sparsity)
    masks = {name: obs.highest(bench.costs[name], count).view_as(bench.weights[name]) for name, count in counts.items()}
    found = bench.compensated(masks, choose=True)
    return Pruned(found.net, found.masks, {"search_loss": best.loss, "search_density": density(bench.knobs, best.levels)})


ONE_SHOT: dict[str, Callable[[Bench, float], Pruned]] = {
    "random": by_score("random"),
    "magnitude": by_score("magnitude"),
    "magnitude-uniform": by_score("magnitude", uniform=True),
    "seed": published,
    "amp-hasa-score": score_alone,
    "amp-hasa-compensated": score_compensated,
    "amp-hasa": amp_hasa,
}


def one_shot(bench: Bench, method: str, sparsity: float) -> Pruned:
    """What a method of `ONE_SHOT` makes. It is kept in the bench's folder: a row with training starts from the row without."""
    path = bench.folder / f"{method}-{100 * sparsity:g}-seed{bench.seed}.safetensors"
    if path.is_file():
        net = copy.deepcopy(bench.net)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
            facts = json.loads(file.metadata()["facts"])
        parts: dict[str, dict[str, Tensor]] = {"net": {}, "mask": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        net.load_state_dict(parts["net"])
        return Pruned(net, parts["mask"], facts)
    made = ONE_SHOT[method](bench, sparsity)
    tensors = {f"net/{name}": value for name, value in made.net.state_dict().items()}
    tensors |= {f"mask/{name}": mask for name, mask in made.masks.items()}
    whole = {name: value.detach().contiguous().clone() for name, value in tensors.items()}  # safetensors takes no shared memory
    atomic_write(path, save(whole, {"facts": json.dumps(made.facts)}))
    return made
