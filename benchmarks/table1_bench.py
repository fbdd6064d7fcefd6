"""What all methods of the table share: images, curvature, removal costs, and what a network is worth on the search split."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from batchnorm_statistics import reestimate_on
from edge_compress import targets
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.data.splits import Split
from edge_compress.pipeline.evaluate.evaluation_context import Bench as Judging
from edge_compress.pipeline.evaluate.mask_evaluator import MaskEvaluator
from edge_compress.pipeline.evaluate.reward_samples import reward_samples
from edge_compress.pipeline.network.compute import Compute
from edge_compress.pipeline.network.memory_layout import layout_for
from edge_compress.pipeline.network.modes import borrowed
from edge_compress.pipeline.options import Pattern, Precision
from edge_compress.pipeline.reconstruct import optimal_brain_surgeon as obs
from edge_compress.pipeline.reconstruct.sequential import sequential_masked
from edge_compress.pipeline.score.connections import ConnectionScores
from edge_compress.pipeline.score.curvature import local_hessian
from edge_compress.pipeline.score.layer_moments import LayerMoments
from edge_compress.pipeline.score.mask_knobs import mask_knobs, selections
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.task.inference import logits
from edge_compress.pipeline.task.load import Loaded
from edge_compress.pipeline.task.samples import batches, image_data, training_inputs
from edge_compress.targets.base import FloatArray, Interface, Structure
from torch import Tensor, nn

IMAGES = 2000  # training images every method gets
MOMENT_IMAGES = 500  # of them, that second moments of layers' inputs are taken on
REWARD_SAMPLES = 1000  # of the search split, for lambda and for the allocation
TUNING_IMAGES = 500  # BatchNorm statistics are taken on, while lambda is tuned
SHARES = tuple(0.85**i for i in range(25))  # of a layer's connections that may stay: 1 down to 0.02, evenly in the logarithm

Masks = dict[str, Tensor]  # layer -> bool in the weight's shape, True stays
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Pruned:
    """A network one method made without training."""

    net: nn.Module  # eval mode
    masks: Masks
    facts: dict[str, float] = field(default_factory=dict)  # what was tuned, for the row


@dataclass(frozen=True)
class Costs:
    """Removal costs in the place of scores: they have no lambda."""

    costs: dict[str, Tensor]  # layer -> in the weight's shape
    name: str = "obs"

    def at(self, lambda_: float) -> dict[str, Tensor]:
        """The costs."""
        return self.costs

    def grid(self) -> tuple[float, ...]:
        """Nothing to tune."""
        return (0.0,)


class Remembering(nn.Module):
    """A teacher that answers for a batch once: all methods of a seed train on the same batches, and half of the work is its.

    Five epochs of 45,000 images and ten classes are 9 MB of answers.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self._answers: dict[bytes, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of inputs (n, C, H, W)."""
        precision = str(torch.is_autocast_enabled("cpu")).encode()
        key = hashlib.blake2b(images.contiguous().numpy().tobytes(), digest_size=16, salt=precision).digest()
        if key not in self._answers:
            self._answers[key] = self.net(images)
        return self._answers[key]


class Bench:
    """What all methods of one seed share. What is dear is computed when it is first asked for.

    Args:
        loaded: trained subject.
        seed: of images, augmentation, drawn labels and search.
        folder: exists; finished evaluations of searches go here.
        evaluations: of a search for the allocation.
        tell: gets a line for each step of long work.
        round_share: of an output's connections that a round of Optimal Brain Surgeon removes; larger is faster.
        device: that networks are trained and judged on, and BatchNorm statistics are taken on; the rest needs a processor.
    """

    def __init__(
        self,
        loaded: Loaded,
        seed: int,
        folder: Path,
        evaluations: int,
        tell: Tell,
        round_share: float = obs.ROUND,
        device: str = "cpu",
    ) -> None:
        self.loaded, self.seed, self.folder, self.evaluations, self.tell = loaded, seed, folder, evaluations, tell
        self.round_share, self.device = round_share, device
        self.data, self.prep = loaded.images, loaded.subject.preprocess
        self.shape = self.data.info.image_shape
        self.captured = capture(loaded.module, loaded.example)
        self.net = self.captured.module
        self.inputs = training_inputs(image_data(self.data, self.prep).train, IMAGES, seed)
        self.knobs = mask_knobs(self.captured, Pattern.WEIGHT, SHARES)
        self.weights = {k.name: self.net.get_parameter(f"{k.name}.weight").detach() for k in self.knobs}
        self.layout = layout_for((self.net,), torch.zeros(2, *self.shape))
        self._laid_out = self.inputs.to(device, memory_format=self.layout)
        self._search = self.data.search.head(REWARD_SAMPLES)
        self._scores: dict[str, ConnectionScores] = {}

    @cached_property
    def latency_ratio(self) -> float:
        """Latency of the dense structure with zeros in it, over that of the dense network: one measurement on this machine."""
        target = targets.load("x86")
        prober = target.prober(self.net, image_signature(self.shape), Precision.FP32)
        key = Structure({}).key()
        known = self.cache.get(key)
        if known is None:
            with closing(LocalDevice().meter(self.dense_file, target.runtime, 1, self.seed)) as meter:
                known = self.cache.put(key, meter.ratio(prober.candidate(Structure({}))))
        return known

    @cached_property
    def dense_file(self) -> bytes:
        """The dense network's float file."""
        return targets.load("x86").baseline(self.net, Interface(image_signature(self.shape), self.data.info.classes))

    @cached_property
    def cache(self) -> LatencyCache:
        """Of the one latency."""
        runtime = targets.load("x86").runtime
        return LatencyCache({"model": self.loaded.subject.model_sha256, **LocalDevice().facts(runtime, 1)}, self.folder)

    @cached_property
    def evaluator(self) -> MaskEvaluator:
        """What settings of all layers are worth on the search split; its answers are kept in the folder."""
        target = targets.load("x86")
        prober = target.prober(self.net, image_signature(self.shape), Precision.FP32)
        images = reward_samples(self.loaded, REWARD_SAMPLES, self.seed)
        self.latency_ratio  # noqa: B018 - the evaluator reads it back: its meter has nothing to measure
        memo = self.folder / f"evaluations-seed{self.seed}.jsonl"
        scores = Costs({name: costs.view_as(self.weights[name]) for name, costs in self.costs.items()})
        with closing(LocalDevice().meter(self.dense_file, target.runtime, 1, self.seed)) as meter:
            judging = Judging(self.inputs, images, prober, meter, self.cache, memo)
            signature, moments = (
                self.loaded.subject.signature,
                LayerMoments(self.net, self.inputs[:MOMENT_IMAGES], Compute(memory_bytes=1 << 40)),
            )
            evaluator = MaskEvaluator(self.captured, signature, Pattern.WEIGHT, self.knobs, scores, moments, judging)
            evaluator.follow(evaluator.rank(0.0))
        return evaluator

    @cached_property
    def curvature(self) -> dict[str, Tensor]:
        """Layer -> how much the logits move with each of its outputs."""
        return obs.output_curvature(self.net, self.inputs[:1000], seed=self.seed)

    @cached_property
    def costs(self) -> dict[str, Tensor]:
        """Layer -> what it costs to remove each connection when its turn comes, (outputs, k), in one currency."""
        found = {}
        self.tell("local Hessians")  # means over positions: sums would make errors on large feature maps dearer
        grams = local_hessian(self.net, batches(self.inputs[:MOMENT_IMAGES]), self.weights)
        for name, weight in self.weights.items():
            gram = grams[name].double()
            self.tell(f"removal costs of {name}")
            own = obs.removal_costs(gram, weight.flatten(1).double() @ gram, share=self.round_share)
            found[name] = own * self.curvature[name][:, None]
        return found

    @cached_property
    def dense_logits(self) -> Tensor:
        """Of the search images, (n, classes)."""
        return torch.from_numpy(self.logits(self.net, self._search))

    @cached_property
    def teacher(self) -> nn.Module:
        """The dense network, for training. A GPU answers faster than its answers of before are found."""
        return Remembering(self.net) if self.device == "cpu" else self.net

    def logits(self, net: nn.Module, split: Split) -> FloatArray:
        """Outputs (n, classes) for the images of a split as they are."""
        return logits(net, split, self.prep, device=self.device, layout=self.layout)

    def divergence(self, net: nn.Module) -> float:
        """KL(dense || net) on the search images, nats: the trained network knows these images, so accuracy tells little there."""
        found = torch.from_numpy(self.logits(net, self._search))
        pair = F.log_softmax(found, 1), F.log_softmax(self.dense_logits, 1)
        return float(F.kl_div(*pair, log_target=True, reduction="batchmean"))

    def scores(self, name: str) -> ConnectionScores:
        """Scores of connections on the same images."""
        if name not in self._scores:
            self._scores[name] = ConnectionScores(self.net, lambda: self.inputs, name, self.seed)
        return self._scores[name]

    def masked(self, masks: Masks, images: int = IMAGES) -> nn.Module:
        """The dense network with zeros in place and BatchNorm re-estimated on so many images."""
        net = copy.deepcopy(self.net)
        with torch.no_grad():
            for name, mask in masks.items():
                net.get_parameter(f"{name}.weight").mul_(mask)
        self.restore(net, images)
        return net

    def restore(self, net: nn.Module, images: int = IMAGES) -> None:
        """Re-estimates BatchNorm on the images that all methods get."""
        with borrowed(net, self.device):
            reestimate_on(net, torch.split(self._laid_out[:images], 250))

    def compensated(self, masks: Masks, *, choose: bool) -> Pruned:
        """Layer after layer re-solved; `choose` lets each layer pick its connections again from what it is really fed."""
        self.tell("solving layer after layer")
        net = sequential_masked(
            self.net,
            masks,
            self.inputs,
            fixed=selections(self.net),
            choose=obs.chooser(self.curvature, self.round_share) if choose else None,
        )
        self.restore(net)
        return Pruned(net, {name: net.get_parameter(f"{name}.weight").detach() != 0 for name in masks})

    def own(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Only the layers that are pruned: zero-padded shortcuts have no connections of their own."""
        return {name: scores[name] for name in self.weights}
