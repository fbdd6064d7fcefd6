"""Compares the artifact's answers on its device with those of the same file on this machine: the device's are what is shipped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...devices.access import settings_of
from ...devices.local import LocalDevice
from ...devices.tensorrt.device import boards_of
from ...targets.base import Elsewhere, Target
from ..errors import DeviceError, described
from ..network.calling import Outputs, tensors_of
from ..run_context import RunContext
from ..run_folder import Stage
from ..task.task import agreement, judged
from ..types import Artifact, Kind, OnDevice
from .references import recorded
from .statistics import evenly_spaced

IMAGES = 200  # spread evenly over the test split


def on_device(run: RunContext, before: Stage, target: Target, artifact: Artifact) -> OnDevice | None:
    """The comparison on some test images; None where the device is this machine, or the target cannot feed another one.

    Raises:
        DeviceError, BuildError, UnavailableError: see `Connection.ask`.
    """
    if isinstance(run.board, LocalDevice) or boards_of(run.board) or not isinstance(target, Elsewhere):
        return None
    settings = {"images": IMAGES, "threads": run.config.threads, "device": run.config.device} | settings_of(run.board)
    stage = run.folder.stage(f"device-{target.name}", "2", settings, (before.key, artifact.file.sha256))

    def ask() -> OnDevice:
        with run.stage(f"answers of {target.name} on {run.config.device}"):
            return _asked(run, target, artifact)

    return stage.once(OnDevice, ask)


def compared(
    run: RunContext, picked: NDArray[np.int64], device: str, kind: Kind, runtime: str, *, there: Outputs, here: Outputs
) -> OnDevice:
    """Compares a device's outputs for the test samples at positions `picked`, `there`, with this machine's, `here`."""
    samples, task, dense = run.loaded.data.test.picked(picked), run.loaded.task, run.loaded.module
    spans = [float(output.double().max() - output.double().min()) for output in here]
    gaps = [
        float((a.double() - b.double()).abs().max()) / max(span, 1e-12) for a, b, span in zip(there, here, spans, strict=True)
    ]
    return OnDevice(
        device=device,
        kind=kind,
        runtime=runtime,
        samples=len(picked),
        agreement=float(agreement(there, here).mean()),
        value=judged(task, samples, recorded(there), dense).value(),
        here_value=judged(task, samples, recorded(here), dense).value(),
        largest_difference=max(gaps),
    )


def _asked(run: RunContext, target: Target, artifact: Artifact) -> OnDevice:
    assert isinstance(target, Elsewhere)  # on_device
    test, path = run.loaded.data.test, run.folder.path / artifact.file.path
    picked = evenly_spaced(len(test), IMAGES)
    inputs = test.batch(picked).artifact_inputs(target)
    with target.runner(path, run.config.threads) as predict:
        here = tensors_of(predict(inputs))
    with run.board.connect() as agent:
        kind = agent.kind()
        model = agent.load(path, target.runtime, run.config.threads)
        expected = f"outputs {[tuple(output.shape) for output in here]}, as on this machine"
        with target.runner_through(path, model.run) as predict:
            try:
                there = tensors_of(predict(inputs))
            except (KeyError, ValueError) as error:  # an output that is not there, or not of one shape for all samples
                raise DeviceError(f"the answers of {agent.name}", found=described(error), expected=expected) from error
        if [output.shape for output in there] != [output.shape for output in here]:
            found = f"outputs {[tuple(output.shape) for output in there]}"
            raise DeviceError(f"the answers of {agent.name}", found=found, expected=expected)
    version = f"{model.package} {model.version}"
    return compared(run, picked, agent.name, kind, version, there=there, here=here)
