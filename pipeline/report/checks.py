"""Checks on a report.json from outside: the pages divide by its figures, draw its shapes and print its names.

Raises:
    TypeError, ValueError: a value that no run writes; the place of it is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ..files import PLAIN_PATH
from ..signature import DTYPES, MOST_AXES, MOST_FIGURE, TOP1, FileTensor
from ..types import Accuracy, FileRef, Speedup, Timing

if TYPE_CHECKING:  # it imports this
    from .report import Report, TargetReport

_NAN_AS_NULL = ("value", "drop", "dense_value", "here_value", "agreement", "largest_difference", "max_accuracy_drop")
_LARGEST = 1 << 63  # integers of other readers of JSON have 64 bits
_COUNTS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})*")


def require_plain(data: Any) -> None:
    """Refuses JSON data with numbers or texts that not every reader takes, and those of a run that was refused."""
    waiting = [("report", data)]
    while waiting:
        at, value = waiting.pop()
        if isinstance(value, dict):
            waiting += chain.from_iterable(((f"{at}.{key}", one), (f"a key of {at}", key)) for key, one in value.items())
        elif isinstance(value, list):
            waiting += ((at, one) for one in value)
        elif isinstance(value, str):
            _require(value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value), at, "half of a surrogate pair")
        elif isinstance(value, int):
            _require(-_LARGEST <= value < _LARGEST, at, "an integer of more than 64 bits")
        elif isinstance(value, float):
            _require(abs(value) <= MOST_FIGURE, at, f"{value}, which is not finite, or beyond {MOST_FIGURE:g}")
    if data.get("pruned", data) is None:
        reasons = "; ".join(f"{name}: {' '.join(t['verdict']['reasons'])}" for name, t in data["targets"].items())
        raise ValueError(f"a run that was refused before its search ({reasons})")


def restore_nan(parts: Iterable[dict[str, Any]]) -> None:
    """Replaces null by NaN in the fields that hold metric values and losses: JSON has no NaN."""
    for part in parts:
        keys = (*_NAN_AS_NULL, "loss", "search_value") if "epoch" in part else _NAN_AS_NULL
        part.update({key: math.nan for key in keys if key in part and part[key] is None})
        if isinstance(part.get("drop_ci95"), list):
            part["drop_ci95"] = [math.nan if end is None else end for end in part["drop_ci95"]]


def require_sound(report: Report) -> None:
    """Refuses figures that no run has."""
    for at, time in (("started", report.started), ("finished", report.finished)):
        _require(_is_time(time), at, f"{time!r}, which is not an ISO 8601 time")
    _require(all(report.tool.packages), "tool.packages", "a package without a name")
    budget = report.gates.density_budget if report.masked else report.gates.latency_budget
    _require(budget is not None, "gates", "no budget")
    for cost in (report.dense, report.pruned):
        _require(min(cost.params, cost.macs) >= 0, "params, macs", "a negative count")
    for knob in report.pruned.knobs:
        _require(0 <= knob.kept <= knob.size > 0, f"pruned.knobs {knob.name}", f"{knob.kept} of {knob.size} units")
    search = report.pruned.search
    _require(search.best_index is None or 0 <= search.best_index < len(search.tried), "best_index", f"{search.best_index}")
    for name, target in report.targets.items():
        if target.accuracy is not None:
            _require_accuracy(f"{name}.accuracy", target.accuracy, report.metric == TOP1)
        if target.latency is not None:
            _require_latency(f"{name}.latency", target.latency)
        for tensor in () if target.artifact is None else (*target.artifact.inputs, *target.artifact.outputs):
            _require_tensor(f"{name}: tensor {tensor.name}", tensor)
        for speedup in _speedups(target):
            _require_speedup(f"{name}.speedup", speedup)
    for point in report.front:
        for found in (point.speedup, point.gain):
            _require_speedup("front.speedup", found)
    for ref in _files(report):
        _require_inside(ref)


def _require(holds: bool, at: str, found: str) -> None:
    if not holds:
        raise ValueError(f"{at[:100].encode('ascii', 'backslashreplace').decode()}: {found}")


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _require_accuracy(at: str, accuracy: Accuracy, top1: bool) -> None:
    _require(accuracy.samples > 0, at, f"{accuracy.samples} samples")
    _require(not top1 or 0.0 <= accuracy.value <= 100.0, at, f"{accuracy.value} %")
    for name, (samples, dense, artifact, lost) in accuracy.classes.items():
        won = lost - (dense - artifact)
        fits = samples > 0 and min(lost, won) >= 0 and 0 <= lost <= dense <= samples and won <= artifact <= samples
        _require(fits and lost + won <= samples, f"{at}.classes {name}", f"{samples, dense, artifact, lost}")


def _require_latency(at: str, latency: Timing) -> None:
    for side in (latency.dense, latency.artifact):
        _require(min(side.p50_ms, side.p90_ms, side.p99_ms) > 0, at, f"{side.p50_ms} ms")
    for samples in (latency.dense_samples_ms, latency.artifact_samples_ms):
        _require(min(samples, default=0.0) > 0, at, "a sample of no time, or none")
    pairs = latency.environment.get("pairs_per_session", "1")
    _require(_COUNTS.fullmatch(pairs) is not None, f"{at}.environment", f"pairs_per_session {pairs[:100]!r}")


def _require_tensor(at: str, tensor: FileTensor) -> None:
    _require(tensor.dtype in DTYPES, at, f"dtype {tensor.dtype[:100]!r}")
    _require(len(tensor.shape) <= MOST_AXES, at, f"{len(tensor.shape)} axes")
    _require(min(tensor.shape, default=1) > 0, at, f"shape {tensor.shape}")
    _require(not tensor.layout or len(tensor.shape) == 4, at, f"shape {tensor.shape} of an image {tensor.layout}")


def _speedups(target: TargetReport) -> Iterator[Speedup | None]:
    """All speedups of a target."""
    quantised = [found for found in (target.unpruned, target.quantised) if found is not None]
    yield from (found.speedup for found in (target.latency, target.dense_form, *quantised) if found is not None)
    yield from (each for found in quantised for each in (found.gain, found.over_half))


def _require_speedup(at: str, speedup: Speedup | None) -> None:
    _require(speedup is None or min(speedup.median, *speedup.ci95) > 0, at, f"{speedup}, which is not above 0")


def _files(report: Report) -> Iterator[FileRef]:
    """All files that a report names."""
    for target in report.targets.values():
        yield from target.files.values()
        yield from chain.from_iterable(target.pictures)
    yield from (ref for ref in (report.pruned.state, report.pruned.masks) if ref is not None)


def _require_inside(ref: FileRef) -> None:
    pure = PurePosixPath(ref.path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in ref.path or not pure.parts:
        raise ValueError(f"{ref.path!r} leads out of the run folder")
    if not PLAIN_PATH.fullmatch(ref.path):
        raise ValueError(f"{ref.path[:200]!r} is not a name that a run gives its files")
