"""Accuracy and speedup of a recorded artifact, measured again: do the new intervals agree with the recorded ones?"""

from __future__ import annotations

from contextlib import closing

import numpy as np

from ... import targets
from ...devices.access import named, open_named
from ...devices.measure.timing import TimingSettings
from ...devices.tensorrt.boards_of import boards_of
from ..codec import from_json, to_json
from ..errors import InputError
from ..progress import Progress
from ..release.record import Record
from ..report.intervals import overlap, share_ci95
from ..report.words import Json, fixed
from ..types import Crop, Kind
from ..verify import golden
from ..verify.golden import Replay, network_inputs

_BATCH = 250
_MACHINE = ("cpu", "runtime", "runtime_version", "threads")  # what makes two latencies comparable


def accuracy(record: Record, target: str, spec: str) -> tuple[Json, str, bool]:
    """The artifact on every test image again, in its own runtime.

    Args:
        record: whose artifact it is.
        target: of the artifact.
        spec: the run's own data, as for `--data`.

    Returns:
        The entry of report.json with the new figures, what came of it, and whether it agrees with the record.

    Raises:
        InputError: the data cannot be read, or is not what the run was made with.
        UnavailableError, BuildError: see `Target.runner`.
    """
    from ..task.datasets import load_data

    report = record.report
    data = load_data(spec, seed=report["seed"], crop=from_json(Crop, crop) if (crop := report["data"].get("crop")) else None)
    if data.info.sha256 != report["data"]["sha256"]:
        raise InputError(
            f"--data {spec} is not what {record.name} was made with",
            found=f"SHA-256 {data.info.sha256[:16]}...",
            expected=f"{report['data']['name']}, {report['data']['sha256'][:16]}...",
        )
    artifact, prep, right = record.artifact(target), report["preprocess"], 0
    assert artifact is not None  # the caller asks for artifacts only
    with targets.load(target).runner(record.path(artifact)) as predict:
        for first in range(0, len(data.test), _BATCH):
            positions = np.arange(first, min(first + _BATCH, len(data.test)))
            logits = predict(network_inputs(data.test.read(positions), tuple(prep["mean"]), tuple(prep["std"])))
            sure = ~np.isnan(logits).any(axis=1)  # a row with a NaN in it names no class
            right += int((sure & (logits.argmax(axis=1) == data.test.labels[positions])).sum())
    count, before = len(data.test), report["targets"][target]["accuracy"]
    top1 = 100.0 * right / count
    low, high = share_ci95(top1, count)
    text = f"top-1 {fixed(top1)} % of {count:,} test images (95 % interval {fixed(low)} to {fixed(high)})"
    if before["kind"] == Kind.NONE:
        return {**before, "top1": top1, "samples": count, "kind": str(Kind.MEASURED)}, f"{text}; none was recorded", True
    agrees = overlap((low, high), share_ci95(before["top1"], before["samples"]))
    said = f"{'agrees' if agrees else 'does not agree'} with the recorded {fixed(before['top1'])} %"
    return {**before, "top1": top1, "drop_pp": before["dense_top1"] - top1}, f"{text}: {said}", agrees


def latency(record: Record, target: str, device: str, ui: Progress) -> tuple[Json, str, bool]:
    """The artifact against its dense float baseline on a device again, in the protocol of a run.

    Args:
        record: whose artifact it is.
        target: of the artifact.
        device: as for `--device`.
        ui: shows a bar, a step for each session.

    Returns:
        As `accuracy`. Figures of another device, processor or runtime are not compared.

    Raises:
        InputError: no such device, or the record has no baseline.
        UnavailableError, DeviceError, BuildError: see `Device.measure`.
    """
    artifact, before = record.artifact(target), record.report["targets"][target]["latency"]
    assert artifact is not None  # the caller asks for artifacts only
    if artifact["baseline"] is None:
        raise InputError(f"{record.name} has no baseline for {target}", do="a speedup cannot be measured without it")
    board, runtime = named(device)[0], targets.load(target).runtime
    settings = TimingSettings(
        threads=before["threads"] or board.threads,
        affinity=board.affinity,
        runtime=runtime if board.transport == "local" else board.runtime,
        seed=record.report["seed"],
    )
    with closing(open_named(device)) as place, ui.bar("timing sessions", settings.sessions + 1) as bar:
        timing = place.measure(record.path(artifact["baseline"]), record.path(artifact), settings, lambda *_: bar.advance())
    now: Json = to_json(timing)
    low, high = timing.speedup.ci95
    flags = f", {', '.join(timing.quality)}" if timing.quality else ""
    text = f"speedup {fixed(timing.speedup.median)} (95 % interval {fixed(low)} to {fixed(high)}{flags}; {timing.kind})"
    if before["kind"] != now["kind"]:
        return now, f"{text}; the record has none that is {now['kind']}", True
    speedup = before["speedup"]
    said = f"{fixed(speedup['median'])} ({fixed(speedup['ci95'][0])} to {fixed(speedup['ci95'][1])})"
    if other := differing(before, now):
        return now, f"{text}; the recorded {said} is of another {' and '.join(other)}", True
    agrees = overlap((low, high), (speedup["ci95"][0], speedup["ci95"][1]))
    return now, f"{text}: {'agrees' if agrees else 'does not agree'} with the recorded {said}", agrees


def engine_answers(record: Record, target: str, device: str) -> Replay:
    """An engine's answers to its golden images, asked again on a board.

    Raises:
        InputError: the device is no board with TensorRT.
        UnavailableError, DeviceError: see `Engines`.
    """
    artifact, entry = record.artifact(target), record.report["targets"][target]["golden"]
    assert artifact is not None  # the caller asks for artifacts only
    if entry is None:
        raise InputError(
            f"{record.name} has no golden images for {target}", do="make the run again: engines have them since then"
        )
    kept = golden.read(record.path(entry))
    with closing(open_named(device)) as place:
        boards = boards_of(place)
        if not boards:
            raise InputError(f"--device {device}", found="no board with TensorRT", expected="one: the artifact is an engine")
        with boards[0].engines() as engines:
            engine = engines.engine(record.path(artifact))
            logits = engines.outputs(engine, network_inputs(kept.pixels, kept.mean, kept.std))
            return golden.compare(kept, logits, golden.where_on(engines))


def differing(one: Json, other: Json) -> list[str]:
    """In what the conditions of two latencies differ, by name; empty where they can be compared."""
    there, here = one["environment"] or {}, other["environment"] or {}
    found = ["device"] if one["device"] != other["device"] else []
    return found + [key.replace("_", " ") for key in _MACHINE if there.get(key) != here.get(key)]
