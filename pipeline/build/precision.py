"""The precision of a target's artifact: what the user asked for, else int8 unless the dense network is slower in it.

Attention is often slower in int8, and on x86 processors without VNNI convolutions can be too: then a pruned float file is the
faster one, and at the same latency it has more channels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...devices.access import settings_of
from ...devices.device import Device
from ...devices.measure.timing import TimingSettings
from ...targets.base import BuildRequest, Structure, Target
from ..files import atomic_write, link_or_copy
from ..options import Precision
from ..pattern.base import Pruning
from ..progress import Bar
from ..run_context import RunContext
from ..run_folder import Stage, file_refs
from ..types import Artifact, Baseline, Speedup

SESSIONS = 3  # enough to tell which of two files is faster


def precision_for(
    run: RunContext, subject_key: str, target: Target, pruning: Pruning, baseline: Baseline, device: Device | None
) -> Precision:
    """The precision of a target's artifact, measured where the network's kind leaves it open; kept in a stage of its own.

    Args:
        run: whose settings and device are used.
        subject_key: of the stage that gave the trained network.
        target: that the artifact is for.
        pruning: how the network is pruned; says whether int8 is taken for granted.
        baseline: the dense float file.
        device: that tells which file is faster; None: the target's first precision is taken.

    Raises:
        BuildError: the dense network cannot be converted.
        DeviceError: see `Device.measure`.
    """
    first, config = target.limits.precisions[0], run.config
    if config.precision is not None:
        return config.precision
    if Precision.FP32 not in target.limits.precisions or not pruning.measures_precision(target):
        return first
    if config.max_size is not None:
        run.notes.append(f"{target.name}: {first} is taken without a measurement, because --max-size limits the file.")
        return first
    if device is None:
        run.notes.append(f"{target.name}: {first} is taken without a measurement: no device tells whether it is the faster one.")
        return first
    settings = {"threads": config.threads, "device": config.device, "precision": str(first)} | settings_of(device)
    stage = run.folder.stage(f"precision-{target.name}", "5", settings, (subject_key, baseline.file.sha256))
    found = stage.result(Speedup)
    if found is None:
        with run.stage(f"precision {target.name}"), run.ui.bar(f"timing the dense network in {first}", SESSIONS + 1) as bar:
            path = stage.folder / f"dense-{first}.model"
            atomic_write(path, pruning.prober(target, first, stage.note).candidate(Structure({})))
            found = _compared(run, target, device, run.folder.path / baseline.file.path, path, bar)
        said = f"{target.name}: the dense network in {first} is {found.median:.2f} times as fast as in float"
        stage.note(f"{said}: the artifact is {first if found.median > 1.0 else Precision.FP32}.")
        stage.finish(found)
    return first if found.median > 1.0 else Precision.FP32


def built_faster(run: RunContext, stage: Stage, target: Target, request: BuildRequest, device: Device | None) -> Artifact:
    """Returns the built artifact, in float where int8 with some layers left in float is the slower file.

    `precision_for` compares float with int8 in all layers. Each layer left in float adds a dequantize and a quantize operator,
    which can cost more than int8 saves. A precision that the user asked for stays, and int8 where the file's size is limited.

    Raises:
        UnavailableError, BuildError: see `Target.build`.
        DeviceError: see `Device.measure`.
    """
    artifact = target.build(request)
    left = artifact.options.get("excluded", "")
    asked = run.config.precision is not None or Precision.FP32 not in target.limits.precisions
    limited = run.config.max_size is not None  # a float file takes four times as many bytes
    if request.precision is not Precision.INT8 or not left or asked or limited or device is None or target.needs_device:
        return artifact
    scratch = stage.folder / "float"
    scratch.mkdir(exist_ok=True)
    in_float = target.build(replace(request, precision=Precision.FP32, folder=scratch))
    float_file = scratch / in_float.file.path
    with run.ui.bar("timing int8 against float", SESSIONS + 1) as bar:
        found = _compared(run, target, device, float_file, request.folder / artifact.file.path, bar)
    if found.median > 1.0:
        return artifact
    said = f"with {left} in float the int8 file is {found.median:.2f} times as fast as the float file"
    stage.note(f"{target.name}: {said}, which is taken instead.")
    for ref in file_refs(in_float):
        link_or_copy(scratch / ref.path, request.folder / ref.path)
    return in_float


def _compared(run: RunContext, target: Target, device: Device, slow: Path, fast: Path, bar: Bar) -> Speedup:
    """The speedup of one file over another, in a few sessions."""
    config = run.config
    how = TimingSettings(threads=config.threads, runtime=target.runtime, seed=config.seed, sessions=SESSIONS, max_seconds=5.0)
    return device.measure(slow, fast, how, lambda done, total: bar.advance()).speedup
