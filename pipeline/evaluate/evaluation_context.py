"""Evaluation context of the search: samples, a device and the latencies measured on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...devices.device import Device
from ...devices.local import LocalDevice
from ...devices.measure.latency_cache import LatencyCache
from ...devices.measure.meter import Meter
from ...devices.measure.referenced import ReferencedMeter
from ...devices.measure.timing import Ratio
from ...targets.base import Estimator, Prober, Structure, Target
from ..config import Config
from ..errors import UnavailableError
from ..network.calling import Inputs
from ..network.compute import CPU, Compute
from ..options import Precision
from ..run_folder import Stage
from ..task.load import Loaded
from ..task.samples import scoring_inputs
from ..types import Kind
from .reward_samples import RewardSamples, judged_at_once, reward_samples

REWARD_SAMPLES = 1000
AHEAD = 16  # candidates measured at once


@dataclass
class Bench:
    """What an evaluator judges candidates with."""

    inputs: Inputs  # training samples, augmented
    reward: RewardSamples
    prober: Prober
    meter: Meter
    cache: LatencyCache | None  # None where nothing is measured
    memo: Path  # file of finished evaluations
    note: Callable[[str], None] = lambda _: None  # told what was reduced or left out
    precision: Precision = Precision.FP32  # what candidates answer in
    sized: bool = False  # whether the artifact's size is limited: candidates then say theirs
    reused: int = 0  # latencies read back from an earlier measurement on the same device
    measured: int = 0  # latencies measured in this run
    fresh: set[str] = field(default_factory=set)  # keys of the structures they were of
    curvature: Stage | None = None  # that keeps the curvature which scores are computed from
    _sizes: dict[str, int] = field(default_factory=dict)  # bytes of files that were made, by structure

    @property
    def kind(self) -> Kind:
        """What the latencies are."""
        return Kind.MEASURED

    def size_bytes(self, structure: Structure) -> int:
        """Of a structure's file in the artifact's precision, without labels and metadata."""
        key = structure.key()
        return self._sizes[key] if key in self._sizes else len(self._file(structure))

    def latency_ratio(self, structure: Structure) -> float:
        """Measured latency of a structure in the artifact's precision, as a share of the dense float model's."""
        assert self.cache is not None  # or it is an EstimatingBench
        key = structure.key()
        known = self.cache.get(key)
        if known is not None:
            self.reused += key not in self.fresh
            return known
        return self._keep(key, self.meter.ratio(self._file(structure)))

    def measure_ahead(self, structures: Sequence[Structure]) -> None:
        """Measure those that are not known, several at once where there are several boards."""
        assert self.cache is not None  # or it is an EstimatingBench
        wanted = {s.key(): s for s in structures}
        new = {key: s for key, s in wanted.items() if self.cache.get(key) is None}
        keys = list(new)
        for start in range(0, len(keys), AHEAD):  # what is done is kept when a board fails
            some = keys[start : start + AHEAD]
            for key, ratio in zip(some, self.meter.ratios([self._file(new[k]) for k in some]), strict=True):
                self._keep(key, ratio)

    def expect(self, structures: Sequence[Structure]) -> None:
        """What is likely to be asked for next: measured now if there are several boards, left for later if there is one."""
        if self.meter.width > 1:
            self.measure_ahead(structures)

    def _file(self, structure: Structure) -> bytes:
        file = self.prober.candidate(structure)
        self._sizes[structure.key()] = len(file)
        return file

    def _keep(self, key: str, ratio: Ratio) -> float:
        assert self.cache is not None  # or it is an EstimatingBench
        self.measured += 1
        self.fresh.add(key)
        return self.cache.put(key, ratio)


class EstimatingBench(Bench):
    """A bench without a device: latencies are the prober's estimates, and there are no times."""

    @property
    def kind(self) -> Kind:
        """See `Bench.kind`."""
        return Kind.ESTIMATED

    def latency_ratio(self, structure: Structure) -> float:
        """Estimated latency of a structure, as a share of the dense one's in the same precision."""
        assert isinstance(self.prober, Estimator)  # open_bench
        return self.prober.estimate(structure)

    def measure_ahead(self, structures: Sequence[Structure]) -> None:
        """Nothing: there are no boards to share estimates among."""


class _NoMeter:
    """What there is to measure with where there is no device."""

    width = 1

    @property
    def dense_ms(self) -> float:
        raise UnavailableError("latencies in milliseconds", found="no device to measure on", expected="a share, such as 0.5")

    def ratio(self, candidate: bytes) -> Ratio:
        raise UnavailableError("a candidate's latency", found="no device to measure on")

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        return [self.ratio(candidate) for candidate in candidates]

    def close(self) -> None:
        """Nothing is open."""


def fewer_judged(loaded: Loaded, compute: Compute) -> dict[str, int]:
    """What stages' keys hold of the samples that candidates are judged on: their number where memory bounds it, else nothing."""
    judged = judged_at_once(loaded, REWARD_SAMPLES, compute)
    return {"judged": judged} if judged < min(REWARD_SAMPLES, len(loaded.data.search)) else {}


@contextmanager
def open_bench(
    config: Config,
    loaded: Loaded,
    target: Target,
    precision: Precision,
    memo: Path,
    *,
    probed: Callable[[Target, Precision, Callable[[str], None]], Prober],
    baseline: bytes,
    form: str = "",
    device: Device | None = None,
    latencies: Path | None = None,
    estimated: bool = False,
    compute: Compute = CPU,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[Bench]:
    """Opens an evaluation context whose device measures until it is closed.

    Args:
        config: its device, threads and seed are used.
        loaded: trained subject.
        target: that the search is for.
        precision: of its artifact.
        memo: file of finished evaluations.
        probed: gives the latency models of candidates.
        baseline: the dense float network's file: the unit of every latency.
        form: of the network in it; measured latencies are kept by it.
        device: that latencies are measured on; None: this machine.
        latencies: folder of measured latencies; None: the user's.
        estimated: there is no device; latencies are estimates of the target's.
        compute: where BatchNorm statistics are computed.
        note: told what was reduced or left out, and how candidates were made where not in the usual way.

    Raises:
        UnavailableError: `estimated`, and the target cannot estimate.
    """
    device = LocalDevice() if device is None else device
    if estimated:
        prober = probed(target, precision, note)
        if not isinstance(prober, Estimator):
            raise UnavailableError(f"latencies of target {target.name}", found="no device to measure them on")
    else:
        # first of all: a device that does not answer is an error at once
        context = _context(config, loaded, target, precision, device) | {"baseline": form}
        context |= {"baseline_sha256": hashlib.sha256(baseline).hexdigest()}  # another exporter makes other files of one network
        prober = probed(target, precision, note)
    inputs = scoring_inputs(loaded.data.train, config.seed)
    reward = reward_samples(loaded, REWARD_SAMPLES, config.seed, compute)
    sized = config.max_size is not None
    if estimated:
        yield EstimatingBench(inputs, reward, prober, _NoMeter(), None, memo, note, precision, sized)
        return
    cache = LatencyCache(context | {"against": "the dense network in the same precision"}, latencies)
    meter = ReferencedMeter(
        lambda file: device.meter(file, target.runtime, config.threads, config.seed),
        baseline,
        lambda: prober.candidate(Structure({})),
        cache,
    )
    with closing(meter):
        yield Bench(inputs, reward, prober, meter, cache, memo, note, precision, sized)


def _context(config: Config, loaded: Loaded, target: Target, precision: Precision, device: Device) -> dict[str, str]:
    """All that a latency depends on besides the structure."""
    return {
        "device": config.device,
        "runtime": target.runtime,
        **device.facts(target.runtime, config.threads),
        "files": "3",  # raised where a target makes other files of the same structure
        "threads": str(config.threads),
        "precision": str(precision),
        "dense": str(loaded.subject.cost.macs),
        "model": loaded.subject.model_sha256,
        "code": loaded.subject.code,  # one state dict fits two forwards
    }
