"""The dense network in an artifact's precision, beside the artifact: what pruning adds to quantising alone.

For an engine in int8 also the dense network in half precision, which is what GPUs are given first; a float artifact is compared
with int8, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ...devices.access import settings_of
from ...devices.device import Device
from ...devices.measure.timing import TimingSettings, speedup_between
from ...devices.tensorrt.device import TensorRtDevice, boards_of
from ...targets.base import Target
from ..build.artifact import unpruned as unpruned_file
from ..errors import BuildError, UnavailableError
from ..options import Precision
from ..run_context import RunContext
from ..run_folder import Stage
from ..task.task import artifact_predictor, judged
from ..types import Artifact, Baseline, Kind, Speedup, TargetResult, Unpruned
from .places import device_for

SESSIONS = 5  # fresh processes, each with all three files


def unpruned_of(
    run: RunContext,
    subject_key: str,
    before: Stage,
    target: Target,
    dense: nn.Module,
    baseline: Baseline,
    result: TargetResult,
    place: Device | None = None,
    *,
    precision: Precision | None = None,
) -> Unpruned | None:
    """What the dense network is worth in a precision, by default that of a target's artifact; kept in a stage of its own.

    In float it is the baseline itself.

    Args:
        run: whose settings and device are used.
        subject_key: of the stage that gave the trained network.
        before: the stage of the artifact.
        target: that the artifact is for.
        dense: the dense network, in the baseline's form.
        baseline: the dense float file.
        result: the artifact with its accuracy and latency.
        place: the device that builds the target's engines; None without one.
        precision: of the dense network; None: the artifact's.

    Returns:
        None where the target refused the dense network, which a note says.

    Raises:
        DeviceError: see `Device.sessions`.
    """
    artifact, accuracy = result.artifact, result.accuracy
    if artifact is None or accuracy is None:
        return None
    precision = precision or artifact.precision
    if precision is Precision.FP32:
        timing, alone = result.latency, Speedup(1.0, (1.0, 1.0))
        timed = (alone, timing.speedup) if timing is not None and timing.kind is Kind.MEASURED else (None, None)
        return Unpruned(Precision.FP32, accuracy.dense_value, accuracy.kind, baseline.file.size_bytes, *timed)
    try:
        file, stage = unpruned_file(run, subject_key, target, dense, precision, baseline)
    except BuildError as error:
        run.notes.append(f"{target.name}: the dense network could not be built in {precision} to compare with: {error}")
        return None
    device = _builder(artifact, place) if target.needs_device else device_for(target, run.board)
    files = [file]
    if isinstance(device, TensorRtDevice) and artifact.precision is not Precision.FP16:
        try:
            files.append(unpruned_file(run, subject_key, target, dense, Precision.FP16, baseline)[0])
        except BuildError as error:
            run.notes.append(f"{target.name}: the dense network could not be built in half precision to compare with: {error}")
    inputs = (stage.key, before.key, artifact.file.sha256)
    kept = run.folder.stage(f"unpruned-compared-{target.name}", "2", settings_of(device), inputs)
    found = kept.result(Unpruned)
    if found is None:
        with run.stage(f"compare with {precision} alone"):
            found = _compared(run, target, artifact, files, baseline, device, kept.note)
        kept.finish(found)
    return found


def _builder(engine: Artifact, place: Device | None) -> Device | None:
    """The board that an engine was built on, which it runs on alone; None where none was built."""
    built_on = engine.options.get("built_on")
    return next((board for board in boards_of(place) if board.name == built_on), None) if place is not None else None


def _compared(
    run: RunContext,
    target: Target,
    artifact: Artifact,
    dense: Sequence[Artifact],
    baseline: Baseline,
    device: Device | None,
    note: Callable[[str], None],
) -> Unpruned:
    loaded, folder, file = run.loaded, run.folder.path, dense[0]
    with target.runner(folder / file.file.path) as answer:
        predict = artifact_predictor(target, answer)
        value = judged(loaded.task, loaded.data.test, predict, loaded.module, run.compute.device).value()
    untimed = f"{target.name}: the dense network in {file.precision} was not timed"
    if target.needs_device and device is None:
        note(f"{untimed}: the artifact's engine, to compare with, was not built.")
    speedup = gain = over_half = None
    if device is not None:
        settings = TimingSettings(threads=run.config.threads, runtime=target.runtime, seed=run.config.seed, sessions=SESSIONS)
        files = [folder / ref.path for ref in (baseline.file, artifact.file, *(one.file for one in dense))]
        try:
            with run.ui.bar(f"timing {file.precision} alone", SESSIONS) as bar:
                sessions = device.sessions(files[0], files[1:], settings, lambda done, total: bar.advance())
        except UnavailableError as error:  # an emulated board
            note(f"{untimed}: {error}")
        else:
            between = partial(speedup_between, sessions, settings=settings)
            speedup, gain = between(None, 1), between(1, 0)
            over_half = between(2, 0) if len(dense) > 1 else None
    kind = target.simulation if target.needs_device else Kind.MEASURED
    return Unpruned(file.precision, value, kind, file.file.size_bytes, speedup, gain, over_half)
