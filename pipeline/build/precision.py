"""The precision of a target's artifact: what the user asked for, else int8 unless the dense network is slower in it.

Convolutions gain from int8 on every runtime; attention often does not, and then a pruned float file is the faster one.
"""

from __future__ import annotations

from ...devices.device import Device
from ...devices.measure.timing import TimingSettings
from ...targets.base import Structure, Target
from ..files import atomic_write
from ..options import Precision
from ..pattern.base import Pruning
from ..run_context import RunContext
from ..types import Baseline, Speedup

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
    if not pruning.measures_precision or Precision.FP32 not in target.limits.precisions:
        return first
    if device is None:
        run.notes.append(f"{target.name}: {first} is taken without a measurement: no device tells whether it is the faster one.")
        return first
    settings = {"threads": config.threads, "device": config.device, "precision": str(first)}
    stage = run.folder.stage(f"precision-{target.name}", "1", settings, (subject_key, baseline.file.sha256))
    found = stage.result(Speedup)
    if found is None:
        with run.stage(f"precision {target.name}"), run.ui.bar(f"timing the dense network in {first}", SESSIONS + 1) as bar:
            path = stage.folder / f"dense-{first}.model"
            atomic_write(path, pruning.prober(target, first).candidate(Structure({})))
            how = TimingSettings(
                threads=config.threads, runtime=target.runtime, seed=config.seed, sessions=SESSIONS, max_seconds=5.0
            )
            found = device.measure(run.folder.path / baseline.file.path, path, how, lambda done, total: bar.advance()).speedup
        said = f"{target.name}: the dense network in {first} is {found.median:.2f} times as fast as in float"
        stage.note(f"{said}: the artifact is {first if found.median > 1.0 else Precision.FP32}.")
        stage.finish(found)
    return first if found.median > 1.0 else Precision.FP32
