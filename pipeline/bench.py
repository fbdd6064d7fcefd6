"""What the search judges candidates with: images, the layers' inner products, a device and what it was measured to take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx, nn

from ..devices.latency_cache import LatencyCache
from ..devices.local import QuickMeter, describe
from ..targets.base import Prober, Structure, Target
from .config import Config
from .curvature import local_hessian
from .images import RewardImages, batches, reward_images, scoring_inputs
from .subject import Loaded
from .types import Precision

REWARD_IMAGES = 1000
MOMENT_IMAGES = 500  # at 8x8 positions each that is 50 columns for every row of a 576 x 576 matrix


@dataclass
class Bench:
    """What candidates are judged with."""

    inputs: Tensor  # training images (n, C, H, W), augmented
    moments: dict[str, Tensor]  # layer -> X X^T of its inputs, on these images
    images: RewardImages
    prober: Prober
    meter: QuickMeter
    cache: LatencyCache
    memo: Path  # file of finished evaluations
    precision: Precision = Precision.FP32  # what candidates answer in
    reused: int = 0  # latencies read back from an earlier measurement on the same device
    measured: int = 0  # latencies measured in this run

    def latency_ratio(self, structure: Structure) -> float:
        """Measured latency of a structure in the artifact's precision, as a share of the dense float model's."""
        key = structure.key()
        known = self.cache.get(key)
        if known is not None:
            self.reused += 1
            return known
        self.measured += 1
        return self.cache.put(key, self.meter.ratio(self.prober.candidate(structure)))


@contextmanager
def open_bench(
    config: Config,
    loaded: Loaded,
    net: fx.GraphModule,
    target: Target,
    precision: Precision,
    memo: Path,
    *,
    affinity: tuple[int, ...] | None = None,
    latencies: Path | None = None,
) -> Iterator[Bench]:
    """A bench whose device measures until the context ends.

    Args:
        config: its device, threads and seed are used.
        loaded: trained subject.
        net: its canonical network, eval mode.
        target: that the search is for.
        precision: of its artifact.
        memo: file of finished evaluations.
        affinity: processors the device measures on; None: any.
        latencies: folder of measured latencies; None: the user's.
    """
    data, prep = loaded.data, loaded.subject.preprocess
    prober = target.prober(net, data.info.image_shape, precision)  # first: what cannot be converted is said at once
    inputs = scoring_inputs(loaded, config.seed)
    grams = moments(net, inputs)
    images = reward_images(data, prep, REWARD_IMAGES, config.seed)
    cache = LatencyCache(_context(config, loaded, target, precision), latencies)
    with QuickMeter(prober.baseline(), target.runtime, config.threads, affinity=affinity, seed=config.seed) as meter:
        yield Bench(inputs, grams, images, prober, meter, cache, memo, precision)


def moments(net: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The layer-local Hessian X X^T of every convolution without groups and every linear layer, on the dense network's inputs."""
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)]
    return local_hessian(net, batches(inputs[:MOMENT_IMAGES]), layers)


def _context(config: Config, loaded: Loaded, target: Target, precision: Precision) -> dict[str, str]:
    """All that a latency depends on besides the structure."""
    machine = describe(target.runtime, config.threads)
    return {
        "device": config.device,
        "runtime": target.runtime,
        **{k: v for k, v in machine.items() if k in ("cpu", "runtime_version", "governor")},
        "threads": str(config.threads),
        "precision": str(precision),
        "dense": str(loaded.subject.cost.macs),
        "model": loaded.subject.model_sha256,
    }
