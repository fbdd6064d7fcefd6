"""What a mask is worth (patterns `weight` and `2:4`): one-shot accuracy under a budget on density.

Zeros buy no latency where they are stored densely, as ONNX Runtime does: every mask has the latency of the dense structure in the
artifact's precision. That is measured, once, and stands with every candidate. What there is to search for is how many connections
each layer keeps, the paper's own reading of sparsity; the budget is on their share over all layers.

A candidate is stitched as in `reconstruct.stitching`: each layer once for each level, its lowest scores masked and the rest
re-solved on the dense network's inputs; then re-estimated BatchNorm statistics, and outputs in the artifact's precision.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from ...targets.base import Structure
from ..axes.capture import Captured
from ..network.cost import cost_of
from ..options import Pattern
from ..reconstruct.least_squares import solve_masked
from ..score import criteria as hasa
from ..score.connections import Scores
from ..score.layer_moments import LayerMoments
from ..score.mask_knobs import Levels, density, layer_mask
from ..signature import Signature
from ..types import Candidate, Knob, Sensitivity
from .evaluation_context import Bench
from .evaluation_log import Memo
from .exported.answering import Int8Answers, int8_answers, uncut


class MaskEvaluator:
    """`env.Evaluator` for masks; `rank` or `follow` comes first.

    Answers are kept in `memo`, so that a search which is run again replays up to where it was.

    Args:
        captured: the dense network.
        signature: of it.
        pattern: `weight` or `2:4`.
        knobs: what `mask_knobs` found.
        scores: of its connections.
        moments: of its layers.
        bench: what candidates are judged with; its one latency is that of the dense structure.
    """

    def __init__(
        self,
        captured: Captured,
        signature: Signature,
        pattern: Pattern,
        knobs: tuple[Knob, ...],
        scores: Scores,
        moments: LayerMoments,
        bench: Bench,
    ) -> None:
        net = captured.module
        self._captured, self._signature, self._moments = captured, signature, moments
        self.net, self.pattern, self._knobs, self.scores, self.bench = net, pattern, knobs, scores, bench
        self._structure = Structure({})  # nothing is narrower
        # Zeros are computed like any other number.
        self._cost = cost_of(net, bench.inputs[:1])
        self._latency = math.nan
        self._candidate = copy.deepcopy(net).eval()
        self._statistics = {name: value.clone() for name, value in net.named_buffers()}
        self._dense_moments = bench.reward.dense_moments(net)
        self._current: Mapping[str, Tensor] = {}
        self._solved: dict[tuple[int, int], Tensor] = {}
        self._memo = Memo(bench.memo, bench.note)

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
        reward = self.bench.reward
        self._candidate.load_state_dict(self._statistics, strict=False)  # matched to the dense network's, not to the last one's
        reward.restore(self._candidate, self._dense_moments, {})
        graph, inputs = self._int8, reward.batch.inputs
        return reward.judge(reward.answers(self._candidate) if graph is None else graph.answers(self._candidate, {}, inputs))

    @cached_property
    def _int8(self) -> Int8Answers | None:
        bench = self.bench
        return int8_answers(uncut(self._captured), self._signature, bench.reward, bench.precision, bench.note)

    def _weight(self, index: int, level: int) -> Tensor:
        """A layer's weight at a level: masked, and what stays re-solved against the dense network's inputs."""
        knob = self.knobs[index]
        weight: Tensor = self.net.get_parameter(f"{knob.name}.weight").detach()
        if level == 0:
            return weight
        if (index, level) not in self._solved:
            mask = layer_mask(self._current[knob.name], self.pattern, knob, level)
            moments = self._moments.gram.get(f"{knob.name}.weight")  # None: too large
            flat = weight.flatten(1)
            kept = mask.flatten(1)
            solved = flat * kept if moments is None else solve_masked(flat, moments[:-1, :-1], kept)
            self._solved[index, level] = solved.view_as(weight)
        return self._solved[index, level]
