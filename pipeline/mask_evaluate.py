"""What a mask is worth (patterns `weight` and `2:4`): one-shot accuracy under a budget on density.

Zeros buy no latency where they are stored densely, as ONNX Runtime does: every mask has the latency of the dense structure in the
artifact's precision. That is measured, once, and stands with every candidate. What there is to search for is how many connections
each layer keeps, the paper's own reading of sparsity; the budget is on their share over all layers.

A candidate is stitched as in `evaluate`: each layer once for each level, its lowest scores masked and the rest re-solved on the
dense network's inputs; then BatchNorm statistics anew, and answers in ONNX Runtime.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from ..targets.base import Structure
from . import hasa
from .bench import Bench
from .candidate import CandidateGraph
from .compensate import solve_masked
from .curvature import gauss_newton
from .distributed import ALONE, World
from .errors import InputError
from .graph import layer_nodes, shape_of
from .images import batches
from .memo import Memo
from .patterns import two_four_fits, two_four_mask, weight_masks
from .sensitivity import CURVATURE_IMAGES
from .types import Candidate, Knob, ModelCost, Pattern, Sensitivity

SHARES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)  # of a layer's connections that may stay, pattern `weight`

Levels = tuple[int, ...]


def mask_knobs(net: fx.GraphModule, pattern: Pattern, shares: Sequence[float] = SHARES) -> tuple[Knob, ...]:
    """One knob for each layer that can be masked, in the order they run; its units are the layer's connections.

    These are convolutions without groups and linear layers on vectors. Pattern 2:4: half of the connections may go, where the
    inputs come in fours. Pattern `weight`: `shares` of them may stay.

    Raises:
        InputError: no layer can carry the pattern.
    """
    found: list[Knob] = []
    still = selections(net)
    for node, layer in layer_nodes(net):
        name, size = str(node.target), layer.weight.numel()
        plain = layer.groups == 1 if isinstance(layer, nn.Conv2d) else len(shape_of(node) or ()) == 2
        if name in still or not plain:
            continue
        if pattern is Pattern.TWO_FOUR:
            counts = {size, size // 2} if two_four_fits(tuple(layer.weight.shape)) else {size}
        else:
            counts = {max(1, round(size * share)) for share in shares}
        if len(counts) > 1:
            found.append(Knob(name, "layer", size, tuple(sorted(counts, reverse=True))))
    if not found:
        raise InputError(
            f"pattern {pattern}: nothing can be masked",
            found="no layer that can carry it",
            expected="a convolution or linear layer whose inputs come in fours" if pattern is Pattern.TWO_FOUR else "a layer",
            do="use --pattern channel",
        )
    return tuple(found)


def selections(net: fx.GraphModule) -> dict[str, Tensor]:
    """Layers that only select channels, which stand for a zero-padded shortcut (`graph.canonical`): layer -> 1 where it selects.

    They have no connections of their own: they are neither masked nor solved, and their zeros stay zeros in training.
    """
    found = {}
    for node, layer in layer_nodes(net):
        weight = layer.weight.detach()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.bias is None:
            ones = weight == 1.0
            if bool(((weight == 0.0) | ones).all()) and int(ones.flatten(1).sum(1).max()) <= 1:
                found[str(node.target)] = ones
    return found


def layer_mask(scores: Tensor, pattern: Pattern, knob: Knob, level: int) -> Tensor:
    """What stays of a layer at a level: bool in the weight's shape, True for the `knob.kept[level]` highest scored."""
    if level == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if pattern is Pattern.TWO_FOUR:
        return two_four_mask(scores)
    return weight_masks({knob.name: scores}, 1.0 - knob.kept[level] / knob.size)[knob.name]


def masks_for(pattern: Pattern, knobs: tuple[Knob, ...], levels: Levels, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a setting: layer -> `layer_mask`."""
    return {k.name: layer_mask(scores[k.name], pattern, k, level) for k, level in zip(knobs, levels, strict=True)}


def density(knobs: tuple[Knob, ...], levels: Levels) -> float:
    """Share of all knobs' connections that stay."""
    return sum(k.kept[level] for k, level in zip(knobs, levels, strict=True)) / sum(k.size for k in knobs)


class Scores(Protocol):
    """Scores of all connections: of a layer the lowest go first."""

    @property
    def name(self) -> str:
        """What the ranking is called."""
        ...

    def at(self, lambda_: float) -> Mapping[str, Tensor]:
        """Layer -> score of the weight's shape."""
        ...

    def grid(self) -> tuple[float, ...]:
        """Lambdas worth trying."""
        ...


class ConnectionScores:
    """Scores of all connections by lambda; the curvature is computed once, when it is first needed.

    Args:
        net: canonical dense network, eval mode.
        inputs: gives training images (n, C, H, W), augmented.
        score: a name in `hasa.SCORES`.
        seed: of the signs the curvature is sampled with, and of the score `random`.
        world: whose ranks share the images out; all of them get the curvature over all images.
    """

    def __init__(self, net: fx.GraphModule, inputs: Callable[[], Tensor], score: str, seed: int, world: World = ALONE) -> None:
        self.name, self._net, self._inputs, self._seed, self._world = hasa.known(score), net, inputs, seed, world
        self._curvature: dict[str, Tensor] | None = None

    def at(self, lambda_: float) -> dict[str, Tensor]:
        """Layer -> score of the weight's shape."""
        weights = {str(node.target): layer.weight for node, layer in layer_nodes(self._net)}
        return hasa.score(self.name, weights, self._measured(), lambda_, seed=self._seed)

    def grid(self) -> tuple[float, ...]:
        """Lambdas worth trying."""
        return hasa.lambda_grid(self.name, self._measured())

    def _measured(self) -> dict[str, Tensor] | None:
        if self._curvature is None and self.name in hasa.CURVED:
            images = self._inputs()[:CURVATURE_IMAGES]
            part = self._world.share(len(images))
            own = gauss_newton(self._net, batches(images[part.start : part.stop]), seed=self._seed, skip=part.start)
            self._curvature = self._world.mean(own, len(part))
        return self._curvature


class MaskEvaluator:
    """`env.Evaluator` for masks; `rank` or `follow` comes first.

    Answers are kept in `memo`, so that a search which is run again replays up to where it was.

    Args:
        net: canonical dense network, eval mode.
        pattern: `weight` or `2:4`.
        knobs: what `mask_knobs` found.
        scores: of its connections.
        bench: what candidates are judged with; its one latency is that of the dense structure.
    """

    def __init__(self, net: fx.GraphModule, pattern: Pattern, knobs: tuple[Knob, ...], scores: Scores, bench: Bench) -> None:
        self.net, self.pattern, self._knobs, self.scores, self.bench = net, pattern, knobs, scores, bench
        self._structure = Structure({})  # nothing is narrower
        # Zeros are computed like any other number.
        self._cost = ModelCost(sum(p.numel() for p in net.parameters()), bench.prober.macs(self._structure))
        self._latency = math.nan
        images = bench.images
        self._graph = CandidateGraph(net, tuple(images.inputs.shape[1:]), images.calibration(bench.precision))
        self._candidate = copy.deepcopy(net).eval()
        self._current: Mapping[str, Tensor] = {}
        self._solved: dict[tuple[int, int], Tensor] = {}
        self._memo = Memo(bench.memo)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The decisions, in the order of every `levels` tuple."""
        return self._knobs

    def rank(self, lambda_: float | None) -> Sensitivity:
        """Settle lambda. None tunes it on the search split: one-shot, every layer at its middle level; the loss decides ties.

        Raises:
            InputError: a lambda the score does not take.
        """
        if lambda_ is not None or self.scores.name not in hasa.CURVED:
            return Sensitivity(self.scores.name, lambda_ or 0.0, {})
        middle = tuple(len(k.kept) // 2 for k in self.knobs)

        def one_shot(lam: float) -> float:
            self._use(lam)
            accuracy, loss = self._answer(middle)
            return accuracy - 1e-3 * min(loss, 10.0)

        chosen, tried = hasa.tune_lambda(one_shot, self.scores.grid())
        return Sensitivity(self.scores.name, chosen, {}, tried)

    def follow(self, ranking: Sensitivity) -> None:
        """Mask by this ranking from here on. The one latency is measured, or read back."""
        self._use(ranking.lambda_)
        self._latency = self.bench.latency_ratio(self._structure)

    def evaluate(self, levels: Levels) -> Candidate:
        """Accuracy and loss on the reward images; the one latency; the density."""
        known = self._memo.get(levels)
        if known is not None:
            return known
        start = time.perf_counter()
        accuracy, loss = self._answer(levels)
        share, seconds = density(self.knobs, levels), time.perf_counter() - start
        return self._memo.add(Candidate(levels, accuracy, loss, self._latency, self.bench.kind, self._cost, seconds, share))

    def latency_estimate(self, levels: Levels) -> float:
        """What the budget limits: the density, exactly."""
        return density(self.knobs, levels)

    def _use(self, lambda_: float) -> None:
        self._current, self._solved = self.scores.at(lambda_), {}

    def _answer(self, levels: Levels) -> tuple[float, float]:
        """Accuracy (share) and loss of a setting on the reward images."""
        with torch.no_grad():
            for i, (knob, level) in enumerate(zip(self.knobs, levels, strict=True)):
                self._candidate.get_submodule(knob.name).weight.copy_(self._weight(i, level))  # type: ignore[operator]
        images = self.bench.images
        images.restore(self._candidate)
        return images.judge(self._graph.answers(self._candidate, self._structure, images.inputs.numpy()))

    def _weight(self, index: int, level: int) -> Tensor:
        """A layer's weight at a level: masked, and what stays re-solved against the dense network's inputs."""
        knob = self.knobs[index]
        weight: Tensor = self.net.get_parameter(f"{knob.name}.weight").detach()
        if level == 0:
            return weight
        if (index, level) not in self._solved:
            mask = layer_mask(self._current[knob.name], self.pattern, knob, level)
            solved = solve_masked(weight.flatten(1), self.bench.moments[knob.name], mask.flatten(1))
            self._solved[index, level] = solved.view_as(weight)
        return self._solved[index, level]
