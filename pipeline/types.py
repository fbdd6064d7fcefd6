"""The results that pass between stages. Read this file first.

    Subject -> Sensitivity -> Knob, Candidate -> Plan -> Checkpoint -> Artifact -> Accuracy + Timing -> Verdict -> report.json

All are frozen and turn into JSON by `codec`; tensors live in files, named by path and digest; a `value` is in the metric's unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from .options import Pattern, Precision
from .signature import TOP1, Crop, FileTensor, Metric, Signature


@dataclass(frozen=True)
class FileRef:
    """A file by path and digest."""

    path: str  # relative to the run folder
    sha256: str
    size_bytes: int


class Kind(StrEnum):
    """How a number was obtained. It never appears under a kind it does not have."""

    MEASURED = "measured"  # this artifact, on this device
    EMULATED = "emulated"  # the real runtime under an emulator: outputs are valid, latencies are not
    ESTIMATED = "estimated"  # from a table or a model of the device
    NONE = "none"  # no number


@dataclass(frozen=True)
class Splits:
    """Sample counts of the three disjoint splits: calibration, search (validation) and test."""

    train: int
    search: int  # cut from the training samples: rewards, lambda, early stopping, ranges
    test: int  # read once, for the report


@dataclass(frozen=True)
class DataInfo:
    """Facts about the data set."""

    name: str
    sha256: str  # of pixels and labels
    classes: tuple[str, ...]
    image_shape: tuple[int, ...]  # (C, H, W) of images; () where a recipe gives network inputs
    splits: Splits
    crop: Crop | None = None  # image folders
    test_given: bool = True  # False: cut from images that the network may have been trained on


@dataclass(frozen=True)
class Preprocess:
    """Normalisation of uint8 pixels to network inputs, and training-time augmentation."""

    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]; () where a recipe gives network inputs
    std: tuple[float, ...]
    augment: str  # a value of options.Augment; for fine-tuning, BatchNorm re-estimation and calibration alike


@dataclass(frozen=True)
class ModelCost:
    """Size and arithmetic of a network, batch 1."""

    params: int
    macs: int  # multiply-accumulates of convolutions, matrix products and attention, whatever calls them


@dataclass(frozen=True)
class Subject:
    """The trained network to be compressed, and its data."""

    model: str
    model_sha256: str  # of the state dict
    data: DataInfo
    preprocess: Preprocess
    cost: ModelCost
    signature: Signature
    metric: Metric = TOP1
    code: str = ""  # digest of the user's code that makes the network, or the version of the package that does


@dataclass(frozen=True)
class Knob:
    """One decision of the search: how many units of a group stay, or of a layer's connections under a mask."""

    name: str  # the group's name, or the layer's
    kind: str  # the group's kind, or "layer": its units are connections
    size: int  # units in the dense network
    kept: tuple[int, ...]  # allowed counts, falling; kept[0] == size; what the target's limits leave
    block: str | None = None  # the block that the group lies inside of: once it is removed, this knob decides nothing

    def level(self, removed: float) -> int:
        """The level that removes nearest to this share of the units: 0 keeps all, 1 is the most pruned level."""
        return min(range(len(self.kept)), key=lambda i: (abs(self.kept[i] - self.size * (1.0 - min(max(removed, 0.0), 1.0))), i))


@dataclass(frozen=True)
class Sensitivity:
    """The ranking of each group's units."""

    score: str  # a value of options.Score
    lambda_: float
    order: dict[str, tuple[int, ...]]  # channel group -> its units, highest score first
    tried: tuple[tuple[float, float], ...] = ()  # (lambda, one-shot accuracy on the search split minus 0.001 times the loss)
    shares: dict[str, tuple[float, ...]] = field(default_factory=dict)  # of the group's summed score, in the same order


@dataclass(frozen=True)
class Candidate:
    """One evaluated setting of all knobs."""

    levels: tuple[int, ...]  # per knob, 0 = dense
    accuracy: float  # share of the reward images (search split) classified correctly, one-shot
    loss: float  # mean cross-entropy on the same images
    latency_ratio: float  # candidate / dense baseline, same runtime: measured over float, estimated over the same precision
    latency_kind: Kind
    cost: ModelCost
    seconds: float = 0.0  # of the evaluation; 0 when read back from the log
    density: float | None = None  # masks: share of the prunable layers' connections that stay; None for channels
    size_bytes: int | None = None  # of its file, in the artifact's format and precision; None without a size limit

    @property
    def spent(self) -> float:
        """The budgeted quantity: latency ratio, or for masks, whose zeros save no latency, the density."""
        return self.latency_ratio if self.density is None else self.density


@dataclass(frozen=True)
class SearchResult:
    """The candidates a search tried, and its choice."""

    method: str  # a value of options.SearchMethod
    best: Candidate
    tried: tuple[Candidate, ...]  # in order
    rewards: tuple[float, ...]  # one for each of `tried`
    evaluations: int  # distinct candidates evaluated
    seconds: float
    budget: float  # on `Candidate.spent`
    finalists: tuple[Candidate, ...] = ()  # the best ones within the limits, in the search's order; else the nearest to them
    latency_reused: int = 0  # latencies from the cache
    latency_measured: int = 0  # latencies measured in this run: the table's and the candidates'
    table_error: float | None = None  # median relative error of the table's estimates against the measured candidates
    savings: tuple[tuple[float, ...], ...] = ()  # per knob and level, shares of the dense latency saved alone: the table
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finalist:
    """One of the search's best plans after sequential reconstruction."""

    candidate: Candidate  # as in the search: layers reconstructed independently, on dense inputs
    accuracy: float  # share of the same reward images, in float; the search's is in the artifact's precision
    loss: float


@dataclass(frozen=True)
class Solved:
    """The chosen plan after re-ranking, its network reconstructed."""

    finalists: tuple[Finalist, ...]  # in the search's order
    taken: int  # position in it
    state: FileRef  # safetensors of the network


@dataclass(frozen=True)
class Plan:
    """What is removed. Together with a state dict and the user's factory it reproduces the pruned network."""

    pattern: Pattern
    score: str
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)  # group name -> kept unit indices, rising
    removed_blocks: tuple[str, ...] = ()  # names of block groups
    removed_share: dict[str, float] = field(default_factory=dict)  # group or layer -> share of its units removed
    masks: FileRef | None = None  # weight patterns: safetensors of uint8 0/1 per layer


@dataclass(frozen=True)
class Epoch:
    """One epoch of fine-tuning."""

    epoch: int
    loss: float
    search_value: float  # of the metric, on the search split
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """The fine-tuned pruned network, with its training history."""

    state: FileRef  # safetensors
    history: tuple[Epoch, ...]
    cost: ModelCost
    sparsity: float  # share of the dense network's weights that are removed or zero


@dataclass(frozen=True)
class Speedup:
    """Median of paired ratios dense/artifact, and its interval from the two-level bootstrap."""

    median: float
    ci95: tuple[float, float]

    def inverted(self) -> Speedup:
        """The same comparison the other way round."""
        return Speedup(1.0 / self.median, (1.0 / self.ci95[1], 1.0 / self.ci95[0]))


@dataclass(frozen=True)
class DenseForm:
    """In which form the dense network is the baseline of latencies: the faster one, where there are two."""

    form: str  # "the network as given", or with its zero-padded shortcuts as convolutions
    other: str = ""  # the slower form; "" where there is none
    speedup: Speedup | None = None  # of `form` over `other` on the device; None where nothing was measured


@dataclass(frozen=True)
class Baseline:
    """The dense float network that latencies are compared with, in a target's format."""

    file: FileRef
    form: DenseForm


@dataclass(frozen=True)
class Artifact:
    """The file built for one target."""

    target: str
    file: FileRef
    format: str  # "onnx", "tflite", "pte", "engine"
    precision: Precision
    input_name: str  # of the first input
    input_shape: tuple[int, ...]
    notes: tuple[str, ...] = ()  # choices and their reasons: ranges, weight bits
    options: dict[str, str] = field(default_factory=dict)  # the same, machine-readable
    baseline: FileRef | None = None  # the dense float model in the same format: what latency is compared with
    choices: tuple[str, ...] = ()  # alternatives tried on the search split, with their figures
    dense_form: DenseForm | None = None  # of `baseline`
    inputs: tuple[FileTensor, ...] = ()
    outputs: tuple[FileTensor, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Quality of an artifact in its own runtime, on the test split, in the unit of the run's metric."""

    value: float
    drop: float  # how much worse than the dense PyTorch network; negative: better
    agreement: float  # with the pruned PyTorch network: share of equal classes, or mean cosine of the outputs
    samples: int
    kind: Kind
    dense_value: float = 0.0
    drop_ci95: tuple[float, float] | None = (0.0, 0.0)  # None: not known
    interval: str = "paired, over the test images"  # what `drop_ci95` is
    correct: str = ""  # base64 of one bit per image, in their order: 1 where a classifier is right; "" where not kept
    classes: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)  # see `verify.by_class`
    confused: tuple[tuple[str, str, int, int], ...] = ()  # see `verify.by_class.confused`


@dataclass(frozen=True)
class Percentiles:
    """Latency of one inference, milliseconds of wall time."""

    p50_ms: float
    p90_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Timing:
    """Latency of an artifact and of the dense float baseline, measured interleaved."""

    device: str
    kind: Kind
    dense: Percentiles
    artifact: Percentiles
    speedup: Speedup
    noise_floor: float  # |median - 1| of the baseline against itself, same protocol
    sessions: int  # fresh processes
    pairs: int
    threads: int
    quality: tuple[str, ...] = ()  # "noisy", "drift", "inconclusive"; empty = quiet
    environment: dict[str, str] = field(default_factory=dict)  # runtime version, cpu, governor, protocol settings
    dense_samples_ms: tuple[float, ...] = ()  # at most 500 each, for the plots
    artifact_samples_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class OnDevice:
    """An artifact's predictions on its device, compared with the same file on this machine."""

    device: str
    kind: Kind  # "measured", or "emulated" on an emulated device
    runtime: str  # version on the device
    samples: int  # test images
    agreement: float  # share of them on which both predict the same class
    value: float  # of the metric, on the device
    here_value: float  # the same images on this machine
    largest_difference: float  # of an output's element, relative to the range of this machine's output


@dataclass(frozen=True)
class Unpruned:
    """The dense network in an artifact's precision, or in int8: what quantising alone gives."""

    precision: Precision
    value: float  # of the metric, test split, in its own runtime
    kind: Kind  # of `value`, as in `Accuracy`
    size_bytes: int
    speedup: Speedup | None = None  # of this file over the dense float baseline; None: no device timed it
    gain: Speedup | None = None  # of the artifact over this file, measured in the same rounds
    over_half: Speedup | None = None  # of an engine over the dense network's in half precision, in the same rounds


@dataclass(frozen=True)
class Verdict:
    """Whether all gates were passed, and which failed."""

    passed: bool
    reasons: tuple[str, ...] = ()  # one sentence per failed gate


@dataclass(frozen=True)
class TargetResult:
    """The result for one target."""

    status: str  # "ok", "not_built", "failed"
    verdict: Verdict
    artifact: Artifact | None = None
    accuracy: Accuracy | None = None
    latency: Timing | None = None
    golden: FileRef | None = None  # a few test images with the artifact's outputs, see `verify/golden.py`
    on_device: OnDevice | None = None  # None: the device is this machine
    pictures: tuple[tuple[FileRef, FileRef], ...] = ()  # of some test samples: with the dense network's outputs, the artifact's
    unpruned: Unpruned | None = None  # None: the target refused the dense network in this precision
    quantised: Unpruned | None = None  # in int8, beside a float artifact; None: not float, no int8 or refused
