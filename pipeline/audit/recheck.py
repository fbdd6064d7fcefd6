"""Measures accuracy and speedup of a recorded artifact again, and compares them with the record."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ... import targets
from ...devices.access import named, open_named, require_processors
from ...devices.measure.timing import TimingSettings
from ...devices.tensorrt.device import boards_of
from ...devices.tensorrt.engines import IOTensors
from ..errors import InputError
from ..progress import Progress
from ..release.record import Record
from ..report.format import fixed, interval
from ..types import Accuracy, Kind, Timing
from ..verify import golden
from ..verify.gates import packed, unpacked
from ..verify.golden import Replay
from ..verify.statistics import overlap, share_ci95, sign_test, unpaired_differ

_FLIPS = 0.001  # share of the images that the same runtime and processor may classify differently: ties broken by rounding
_LEVEL = 0.05  # of the test whether another machine's answers are worse or better
_MACHINE = ("cpu", "runtime", "runtime_version", "threads")  # what makes two latencies comparable


def accuracy(record: Record, target: str, spec: str) -> tuple[Accuracy, str, bool]:
    """Accuracy of a target's artifact on the whole test split, measured again on the run's own data (`spec` as for `--data`).

    Compared image by image where the record says which images were classified correctly: with the same runtime and processor
    one image in a thousand may change; elsewhere losses and gains must not differ by more than chance gives (exact sign test).

    Returns:
        The new figures, a sentence on them, and whether they agree with the record.

    Raises:
        InputError: the data cannot be read, or the run was made with other data.
        UnavailableError, BuildError: see `Target.runner`.
    """
    from ..data.datasets import load_data
    from ..task.classification import Classification
    from ..task.samples import ImageSamples
    from ..task.task import artifact_predictor, judged

    report = record.report
    if not report.data.image_shape:
        raise InputError("--data", found=f"a run of a recipe, {report.model.name}", do="give the recipe: --recipe FILE.py")
    data = load_data(spec, seed=report.seed, crop=report.data.crop, order=report.data.classes)
    if data.info.sha256 != report.data.sha256:
        raise InputError(
            f"--data {spec} is not what {record.name} was made with",
            found=f"SHA-256 {data.info.sha256[:16]}...",
            expected=f"{report.data.name}, {report.data.sha256[:16]}...",
        )
    runtime = targets.load(target)
    with runtime.runner(record.path(record.artifacts[target])) as run:
        samples = ImageSamples(data.test, report.preprocess)
        each = judged(Classification(), samples, artifact_predictor(runtime, run)).per_sample()
    assert each is not None  # a classifier's
    right = each > 50.0
    count, top1, before = len(right), 100.0 * float(right.mean()), report.targets[target].accuracy
    text = f"top-1 {fixed(top1)} % of {count:,} test images (95 % interval {interval(share_ci95(top1, count))})"
    if before is None:
        whole, bits = report.dense.value, packed(right)
        fresh = Accuracy(top1, whole - top1, math.nan, count, Kind.MEASURED, whole, None, "not known", bits)
        return fresh, f"{text}; none was recorded", True
    agrees, why = _agrees(record, target, before, right)
    now = replace(before, value=top1, drop=before.dense_value - top1, samples=count, correct=packed(right))
    said = f"{'agrees' if agrees else 'does not agree'} with the recorded {fixed(before.value)} %"
    return now, f"{text}: {said} ({why})", agrees


def by_recipe(record: Record, target: str, recipe: Path) -> tuple[Accuracy, str, bool]:
    """The value of a recipe's metric for a target's artifact on the whole test split, measured again.

    With the same runtime and processor it may differ from the recorded value by a thousandth of it; elsewhere the artifact's drop
    has to lie in the recorded interval.

    Args:
        record: of the run.
        target: whose artifact is asked.
        recipe: the file the run was made from.

    Returns:
        As `accuracy`.

    Raises:
        InputError: the recipe fails, or the run was made with other data.
        UnavailableError, BuildError: see `Target.runner`.
    """
    from ..task.load import load_recipe
    from ..task.recipe import read_recipe
    from ..task.task import artifact_predictor, judged

    report, loaded = record.report, load_recipe(read_recipe(recipe), record.report.seed)
    found = loaded.subject.data.sha256
    if report.data.image_shape or found != report.data.sha256:
        raise InputError(
            f"--recipe {recipe} is not what {record.name} was made with",
            found=f"data of SHA-256 {found[:16]}...",
            expected=f"{report.data.name}, {report.data.sha256[:16]}...",
        )
    metric, test, runtime = report.metric, loaded.data.test, targets.load(target)
    with runtime.runner(record.path(record.artifacts[target])) as run:
        value = judged(loaded.task, test, artifact_predictor(runtime, run), loaded.module).value()
    text = f"{metric.name} {metric.shown(value)} of {len(test):,} test samples"
    before = report.targets[target].accuracy
    dense = report.dense.value if before is None else before.dense_value
    drop = metric.drop(dense, value)
    if before is None:
        fresh = Accuracy(value, drop, math.nan, len(test), Kind.MEASURED, dense, None, "not known")
        return fresh, f"{text}; none was recorded", True
    now = replace(before, value=value, drop=drop)
    if _same_place(record, target):
        agrees, why = abs(value - before.value) <= _FLIPS * abs(before.value), "same runtime and processor: to a thousandth"
    else:
        low, high = before.drop_ci95 or (-math.inf, math.inf)
        agrees, why = low <= drop <= high, "on another processor or runtime: its drop in the recorded interval"
    said = f"{'agrees' if agrees else 'does not agree'} with the recorded {metric.shown(before.value)}"
    return now, f"{text}: {said} ({why})", agrees


def _same_place(record: Record, target: str) -> bool:
    """Whether the record's answers are of this runtime and this processor."""
    ref = record.report.targets[target].golden
    return ref is not None and not golden.read(record.path(ref)).where.differing(golden.where(targets.load(target)))


def _agrees(record: Record, target: str, before: Accuracy, right: NDArray[np.bool_]) -> tuple[bool, str]:
    """Whether an accuracy agrees with the recorded one, and what that rests on."""
    try:
        known = unpacked(before)
    except ValueError as error:
        return False, f"the record contradicts itself: {error}"
    if known is None or len(known) != len(right):
        agrees = not unpaired_differ(before.value, before.samples, 100.0 * float(right.mean()), len(right))
        return agrees, "unpaired: the record does not say which images were classified correctly"
    lost, won = int((known & ~right).sum()), int((right & ~known).sum())
    changed = f"of {len(right):,} images {lost} are lost and {won} won"
    if _same_place(record, target):
        allowed = max(1, int(_FLIPS * len(right)))
        return lost + won <= allowed, f"{changed}, at most {allowed} may change with the same runtime and processor"
    chance = sign_test(lost, won)
    return chance >= _LEVEL, f"{changed}, paired sign test p = {chance:.2g}"


def latency(record: Record, target: str, device: str, ui: Progress) -> tuple[Timing, str, bool]:
    """Latency of a target's artifact against its dense float baseline, measured again on a device, in the protocol of a run.

    Returns:
        As `accuracy`. Figures of another device, processor or runtime are not compared.

    Raises:
        InputError: no such device, or the record has no baseline.
        UnavailableError, DeviceError, BuildError: see `Device.measure`.
    """
    artifact, before = record.artifacts[target], record.report.targets[target].latency
    if artifact.baseline is None:
        raise InputError(f"{record.name} has no baseline for {target}", do="a speedup cannot be measured without it")
    board, runtime = named(device)[0], targets.load(target).runtime
    threads = before.threads if before else board.threads
    whose = f"{record.name}: {target} was measured with threads" if before else f"{board.file}: threads"
    require_processors(device, threads, whose, "name a --device that has as many")
    settings = TimingSettings(
        threads=threads,
        affinity=board.affinity,
        runtime=runtime if board.transport == "local" else board.runtime,
        seed=record.report.seed,
    )
    with closing(open_named(device)) as place, ui.bar("timing sessions", settings.sessions + 1) as bar:
        now = place.measure(record.path(artifact.baseline), record.path(artifact), settings, lambda *_: bar.advance())
    flags = f", {', '.join(now.quality)}" if now.quality else ""
    text = f"speedup {fixed(now.speedup.median)} (95 % interval {interval(now.speedup.ci95)}{flags}; {now.kind})"
    if before is None or before.kind != now.kind:
        return now, f"{text}; the record has none that is {now.kind}", True
    said = f"{fixed(before.speedup.median)} ({interval(before.speedup.ci95)})"
    if other := differing(before, now):
        return now, f"{text}; the recorded {said} is of another {' and '.join(other)}", True
    agrees = overlap(now.speedup.ci95, before.speedup.ci95)
    return now, f"{text}: {'agrees' if agrees else 'does not agree'} with the recorded {said}", agrees


def engine_answers(record: Record, target: str, device: str) -> Replay:
    """An engine's answers to its golden samples on a board, compared with the recorded ones.

    Raises:
        InputError: the device is not a board with TensorRT.
        UnavailableError, DeviceError: see `Engines`.
    """
    ref = record.report.targets[target].golden
    if ref is None:
        raise InputError(f"{record.name} has no golden samples for {target}", do="make the run again: it adds them")
    kept = golden.read(record.path(ref))
    with closing(open_named(device)) as place:
        boards = boards_of(place)
        if not boards:
            raise InputError(f"--device {device}", found="no board with TensorRT", expected="one: the artifact is an engine")
        with boards[0].engines() as engines:
            engine, artifact = engines.engine(record.path(record.artifacts[target])), record.report.targets[target].artifact
            assert artifact is not None  # it has golden samples
            if not artifact.outputs:
                raise InputError(f"{record.name} does not name the engine's tensors", do="make the run again: it adds them")
            inputs = golden.as_tuple(kept.artifact_inputs(targets.load(target)))
            found = engines.outputs(engine, inputs, IOTensors(artifact.inputs, artifact.outputs))
            return golden.compare(kept, found, golden.where_on(engines))


def differing(one: Timing, other: Timing) -> list[str]:
    """In what the conditions of two latencies differ, by name; empty where they can be compared."""
    there, here = one.environment, other.environment
    found = ["device"] if one.device != other.device else []
    return found + [key.replace("_", " ") for key in _MACHINE if there.get(key) != here.get(key)]
