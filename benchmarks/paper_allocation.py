"""How many connections each layer keeps, searched by all processes together: each answers for its share of the images.

The product's evaluator answers in ONNX Runtime and re-solves layers; this one answers on the training device and masks alone, as
the paper does. Every process runs the same search on the same rewards, which are means over all images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from batchnorm_statistics import reestimate_on
from edge_compress.pipeline.axes.capture import Captured
from edge_compress.pipeline.data.splits import Split
from edge_compress.pipeline.finetune.world import World
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.score import criteria as hasa
from edge_compress.pipeline.score.connections import ConnectionScores
from edge_compress.pipeline.score.mask_knobs import density, mask_knobs, masks_for
from edge_compress.pipeline.score.masks import weight_masks
from edge_compress.pipeline.search.problem import Levels, SearchSettings
from edge_compress.pipeline.search.search import search
from edge_compress.pipeline.search.search_log import Hints
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.types import Candidate, Kind, Knob, ModelCost, Preprocess
from table1_bench import SHARES
from table1_methods import exactly, within
from torch import Tensor, nn

BATCH = 100  # images of a batch for BatchNorm statistics

Masks = dict[str, Tensor]  # layer -> bool in the weight's shape, True stays


class SharedEvaluator:
    """`env.Evaluator` for masks, over all processes: one-shot accuracy with BatchNorm re-estimated.

    Args:
        net: captured dense network on the world's device, eval mode.
        knobs: what `mask_knobs` found.
        inputs: training images (n, C, H, W), augmented, for BatchNorm; the same on every rank.
        split: reward images; the same on every rank.
        prep: how they become inputs.
        world: who shares them out.
    """

    def __init__(
        self, net: nn.Module, knobs: tuple[Knob, ...], inputs: Tensor, split: Split, prep: Preprocess, world: World
    ) -> None:
        part = world.share(len(inputs))
        self.net, self._knobs, self._prep, self._world = net, knobs, prep, world
        self._inputs = inputs[part.start : part.stop]
        self._split = Split(split.source, split.indices[list(world.share(len(split)))])
        self._candidate = copy.deepcopy(net)
        self._scores: Mapping[str, Tensor] = {}

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The decisions, in the order of every `levels` tuple."""
        return self._knobs

    def follow(self, scores: Mapping[str, Tensor]) -> None:
        """Mask by these scores from here on."""
        self._scores = scores

    def evaluate(self, levels: Levels) -> Candidate:
        """Accuracy and loss over all ranks' reward images; no latency, since a mask has that of the dense network."""
        start = time.monotonic()
        masks = masks_for(Pattern.WEIGHT, self._knobs, levels, self._scores)
        put(self.net, self._candidate, masks)
        device = self._world.device
        reestimate_on(self._candidate, (part.to(device) for part in torch.split(self._inputs, BATCH)))
        self._world.average_buffers(self._candidate)
        found = logits(self._candidate, self._split, self._prep, device=device)
        labels = self._split.labels
        own = float(F.cross_entropy(torch.from_numpy(found), torch.from_numpy(labels)))
        accuracy = self._world.mean_of(top1(found, labels) / 100.0, len(labels))
        loss, share = self._world.mean_of(own, len(labels)), density(self._knobs, levels)
        return Candidate(levels, accuracy, loss, 1.0, Kind.NONE, ModelCost(0, 0), time.monotonic() - start, share)

    def latency_estimate(self, levels: Levels) -> float:
        """What the budget limits: the density, exactly."""
        return density(self._knobs, levels)


def put(dense: nn.Module, net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """The dense network's weights into `net`, with zeros where the masks have them."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = dense.get_parameter(f"{name}.weight")
            net.get_parameter(f"{name}.weight").copy_(weight * mask.to(weight.device))


def allocated(
    captured: Captured,
    scores: ConnectionScores,
    inputs: Tensor,
    split: Split,
    prep: Preprocess,
    sparsity: float,
    settings: tuple[str, int, int],
    lambda_: float | None,
    world: World,
    tell: Callable[[str], None],
) -> tuple[Masks, float]:
    """Masks that keep just the share asked for, the same on all ranks, and the lambda of their scores.

    Args:
        captured: the dense network, on the world's device.
        scores: of its connections.
        inputs: training images (n, C, H, W), see `SharedEvaluator`.
        split: reward images.
        prep: how they become inputs.
        sparsity: share of all connections that go, in (0, 1).
        settings: method, evaluations and seed of the search.
        lambda_: None tunes it at equal shares in every layer.
        world: who shares the images out.
        tell: gets a line for each evaluation.
    """
    net, knobs = captured.module, mask_knobs(captured, Pattern.WEIGHT, SHARES)
    evaluator, share = SharedEvaluator(net, knobs, inputs, split, prep, world), 1.0 - sparsity

    def use(lam: float) -> Mapping[str, Tensor]:
        # chosen from on the CPU: which of equal scores goes must not be a matter of the device
        found = {name: score.cpu() for name, score in scores.at(lam).items()}
        evaluator.follow(found)
        return found

    def one_shot(lam: float) -> float:
        use(lam)
        found = evaluator.evaluate(tuple(knob.level(sparsity) for knob in knobs))
        tell(f"lambda {lam:g}: one-shot accuracy {found.accuracy:.3f}")
        return found.accuracy - 1e-3 * min(found.loss, 10.0)

    lam = hasa.tune_lambda(one_shot, scores.grid())[0] if lambda_ is None else lambda_
    current = use(lam)
    sizes = {knob.name: net.get_parameter(f"{knob.name}.weight").detach().abs().cpu() for knob in knobs}
    by_magnitude = {name: int(mask.sum()) for name, mask in weight_masks(sizes, sparsity).items()}
    method, evaluations, seed = settings
    how = SearchSettings(method, evaluations, share, seed=seed, limits="density")

    def report(candidate: Candidate, reward: float) -> None:
        tell(f"allocation: accuracy {candidate.accuracy:.3f} at {candidate.spent:.3f} of the connections")

    best = search(evaluator, how, report, Hints((within(knobs, by_magnitude, share),))).best
    world.agree("search", repr(best.levels))
    counts = exactly({k.name: (k.kept[level], k.size) for k, level in zip(knobs, best.levels, strict=True)}, share)
    gone = {k.name: 1.0 - counts[k.name] / k.size for k in knobs}
    masks = weight_masks({name: current[name] for name in gone}, gone)
    world.agree("masks", masks)
    return masks, lam
