"""The report of a run: the types behind report.json, which is their JSON. Keys are added, never renamed.

Everything shown to people (pages, model cards, comparisons) is made from a `Report` alone. Numbers that JSON cannot hold (NaN,
infinities) are null in the file. Fields that may be so are optional here, but for the values of the metric and the training
loss, which are NaN. An accuracy or a latency that is not known is None here; in the file all its keys are null, but for `kind`,
which is "none".
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...devices.measure.usage import Usage
from ..codec import MOST_JSON_BYTES, finite, from_json, json_sha256, parsed, to_json
from ..errors import InputError
from ..files import read_regular
from ..options import Precision
from ..signature import TOP1, FileTensor, Metric, Signature, image_signature
from ..types import (
    Accuracy,
    DataInfo,
    DenseForm,
    Epoch,
    FileRef,
    Kind,
    ModelCost,
    OnDevice,
    Preprocess,
    Speedup,
    Timing,
    Unpruned,
    Verdict,
)
from .checks import require_plain, require_sound, restore_nan
from .front import FrontPoint

SCHEMA = 1
_DIGEST = "sha256"  # of all other keys
_TOP1_NAMES = {
    "top1": "value",
    "search_top1": "search_value",
    "dense_top1": "dense_value",
    "here_top1": "here_value",
    "drop_pp": "drop",
    "drop_ci95_pp": "drop_ci95",
}
_NUMBERS: dict[str, type[Accuracy] | type[Timing]] = {"accuracy": Accuracy, "latency": Timing}


@dataclass(frozen=True)
class Tool:
    """What made the report."""

    version: str
    packages: dict[str, str]
    licenses: dict[str, str] = field(default_factory=dict)  # package -> the licence it states, "" where none


@dataclass(frozen=True)
class Named:
    """A network, by name and the digest of its state dict."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Gates:
    """What the run was asked to keep to."""

    max_accuracy_drop: float  # of the metric, in its unit; top-1: percentage points
    min_speedup: float  # lower end of the 95 % interval
    max_size_bytes: int | None = None
    latency_budget: float | None = None  # share of the dense latency, or
    density_budget: float | None = None  # share of the connections


@dataclass(frozen=True)
class Dense(ModelCost):
    """The dense network in PyTorch; its file is the target's dense baseline."""

    value: float  # of the metric, test split
    size_bytes: int
    search_value: float | None = None  # search split


@dataclass(frozen=True)
class Tried(ModelCost):
    """A candidate of the search; see `types.Candidate`."""

    levels: tuple[int, ...]
    accuracy: float | None
    loss: float | None
    latency_ratio: float | None  # None where its kind is `none`
    latency_kind: Kind
    seconds: float = 0.0
    density: float | None = None
    size_bytes: int | None = None
    reward: float | None = None


@dataclass(frozen=True)
class ReportedFinalist:
    """One of the search's best plans."""

    levels: tuple[int, ...]
    accuracy: float | None  # as the search saw it
    solved: float | None  # after sequential reconstruction
    taken: bool


@dataclass(frozen=True)
class Search:
    """What the search tried and chose; see `types.SearchResult`."""

    method: str
    evaluations: int
    seconds: float
    best: Tried
    tried: tuple[Tried, ...]
    best_index: int | None = None  # of `best` in `tried`
    latency_reused: int = 0
    latency_measured: int = 0
    table_error: float | None = None
    notes: tuple[str, ...] = ()
    finalists: tuple[ReportedFinalist, ...] = ()


@dataclass(frozen=True)
class Kept:
    """What stays of a group's units, or of a layer's connections."""

    name: str
    kind: str  # see `types.Knob`
    size: int
    kept: int
    share: float
    block: str | None = None  # the removed block it was part of
    saved: float | None = None  # share of the dense latency that this alone saves, by the table; None: masks, or an older run
    score: float | None = None  # share of the group's summed score that what was removed had; None: not scored, or an older run


@dataclass(frozen=True)
class Pruned(ModelCost):
    """The pruned network in PyTorch, and how it came to be."""

    value: float  # of the metric, test split
    sparsity: float  # share of the dense network's weights that are removed or zero
    pattern: str
    score: str
    search: Search
    knobs: tuple[Kept, ...]
    thresholds: dict[str, float]  # group or layer -> share removed
    finetune: tuple[Epoch, ...]
    state: FileRef
    masks: FileRef | None = None
    prunable_macs_share: float | None = None  # of the dense network's MACs; None: connections were masked, or an older run


@dataclass(frozen=True)
class ReportedArtifact(FileRef):
    """A target's file; see `types.Artifact`."""

    target: str
    format: str
    precision: Precision
    input_name: str
    input_shape: tuple[int, ...]
    notes: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    baseline: FileRef | None = None
    choices: tuple[str, ...] = ()
    inputs: tuple[FileTensor, ...] = ()  # () in older runs
    outputs: tuple[FileTensor, ...] = ()


@dataclass(frozen=True)
class TargetReport:
    """What came of one target."""

    status: str  # "ok", "not_built", "failed"
    verdict: Verdict
    artifact: ReportedArtifact | None = None
    accuracy: Accuracy | None = None  # None: not known
    latency: Timing | None = None
    golden: FileRef | None = None
    on_device: OnDevice | None = None
    dense_form: DenseForm | None = None  # of the baseline; in the file `latency.baseline`
    unpruned: Unpruned | None = None  # None: not known, or an older run
    quantised: Unpruned | None = None  # see `types.TargetResult`
    pictures: tuple[tuple[FileRef, FileRef], ...] = ()  # see `types.TargetResult`
    usage: Usage | None = None  # None: an engine, or an older run

    @property
    def why(self) -> str:
        """The reasons of the verdict, in one line; the status where there are none."""
        return "; ".join(self.verdict.reasons) or self.status

    @property
    def alone(self) -> Unpruned | None:
        """The dense network quantised; None where it is not known, or is the dense float baseline itself."""
        return self.quantised or (None if self.unpruned is None or self.unpruned.precision is Precision.FP32 else self.unpruned)

    @property
    def gains(self) -> tuple[tuple[Precision, Speedup], ...]:
        """Speedups over the dense network quantised alone, in int8 and in half precision, as far as they were measured."""
        found = ((alone.precision, alone.gain), (Precision.FP16, alone.over_half)) if (alone := self.alone) else ()
        return tuple((precision, gain) for precision, gain in found if gain is not None)

    @property
    def files(self) -> dict[str, FileRef]:
        """The target's files: artifact, baseline, golden, as far as it has them."""
        baseline = self.artifact.baseline if self.artifact else None
        found = {"artifact": self.artifact, "baseline": baseline, "golden": self.golden}
        return {name: ref for name, ref in found.items() if ref is not None}


@dataclass(frozen=True)
class Header:
    """What every report.json begins with: what was run on what, and when."""

    tool: Tool
    model: Named
    data: DataInfo
    preprocess: Preprocess
    signature: Signature
    metric: Metric
    seed: int
    command: str
    started: str  # ISO 8601
    finished: str


@dataclass(frozen=True)
class Report(Header):
    """report.json."""

    stage_seconds: dict[str, float]
    gates: Gates
    passed: bool
    dense: Dense
    pruned: Pruned
    targets: dict[str, TargetReport]
    notes: tuple[str, ...] = ()
    front: tuple[FrontPoint, ...] = ()  # of a run with several budgets: all of them
    schema: int = SCHEMA

    @property
    def masked(self) -> bool:
        """Whether single connections were pruned in place, under a budget on density; else channels, under one on latency."""
        return self.pruned.search.best.density is not None


@dataclass(frozen=True)
class Refusal(Header):
    """report.json of a run that ended before its search: the converter or the runtime refused the network."""

    dense: ModelCost
    targets: dict[str, TargetReport]  # all failed, for the same reason
    notes: tuple[str, ...] = ()
    passed: bool = False
    pruned: None = None
    schema: int = SCHEMA


def encode(report: Report | Refusal) -> dict[str, Any]:
    """report.json: JSON types only."""
    data: dict[str, Any] = finite(to_json(report))
    for target in data["targets"].values():
        for key, cls in _NUMBERS.items():
            target[key] = target[key] or {**dict.fromkeys(cls.__dataclass_fields__), "kind": str(Kind.NONE)}
        target["latency"]["baseline"] = target.pop("dense_form")
    if report.metric == TOP1:  # the names that classifiers' figures had before there were other metrics
        for part in _judged_parts(data):
            part.update({old: part[new] for old, new in _TOP1_NAMES.items() if new in part})
    return data


def decode(data: Any) -> Report:
    """The report in a report.json; the inverse of `encode`.

    Raises:
        TypeError, KeyError, ValueError, AttributeError: not a report's shape, a figure that no run has, or a path in it leads
            out of the run folder.
    """
    require_plain(data)
    data = {"metric": to_json(TOP1), **copy.deepcopy(data)}
    data.pop(_DIGEST, None)
    if "signature" not in data:  # of an earlier version, which knew image classifiers only
        info = data["data"]
        data["signature"] = to_json(image_signature(tuple(info["image_shape"]), len(info["classes"])))
    for part in _judged_parts(data):
        for old, new in _TOP1_NAMES.items():
            if old in part:
                part[new] = part.pop(old)
    restore_nan([*_judged_parts(data), data["gates"]])
    report = from_json(Report, {**data, "targets": {name: _flat(target) for name, target in data["targets"].items()}})
    if report.schema != SCHEMA:
        raise ValueError(f"schema {report.schema}, where this version reads {SCHEMA}")
    require_sound(report)
    return report


def _judged_parts(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a report's JSON that hold values of the metric."""
    pruned, targets = data.get("pruned") or {}, data["targets"].values()
    found = [
        data["dense"],
        pruned,
        *pruned.get("finetune", ()),
        *(t.get(k) for t in targets for k in ("accuracy", "on_device", "unpruned", "quantised")),
    ]
    yield from (part for part in found if part)


def to_text(report: Report | Refusal) -> str:
    """The text of report.json, with its own digest."""
    data = encode(report)
    return json.dumps({**data, _DIGEST: json_sha256(data)}, indent=1, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """The report in a report.json.

    Raises:
        InputError: it cannot be read, is not a report, or was changed.
    """
    try:
        data = parsed(read_regular(path, MOST_JSON_BYTES))
        if data.get(_DIGEST) not in (None, json_sha256({k: v for k, v in data.items() if k != _DIGEST})):  # None: an older one
            raise ValueError("another content than its own SHA-256 says: it was changed")
        return decode(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"no key {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path} is not a report", found=found or repr(error), expected="the report.json of a finished run", do="run again"
        ) from error


def _flat(target: dict[str, Any]) -> dict[str, Any]:
    """A target's entry in the file, as `TargetReport` has it."""
    latency = {**target["latency"]}
    form = latency.pop("baseline", None)
    found = {**target, "latency": latency, "dense_form": form}
    return found | {key: None for key in _NUMBERS if found[key]["kind"] == Kind.NONE}
