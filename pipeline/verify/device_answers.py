"""Compares the artifact's answers on its device with those of the same file on this machine: the device's are what is shipped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...devices.local import LocalDevice
from ...devices.tensorrt.device import boards_of
from ...targets.base import Elsewhere, FloatArray, Target
from ..run_context import RunContext
from ..run_folder import Stage
from ..task.inference import predictions, top1
from ..task.splits import artifact_images
from ..types import Artifact, Kind, OnDevice
from .statistics import evenly_spaced

IMAGES = 200  # spread evenly over the test split


def on_device(run: RunContext, before: Stage, target: Target, artifact: Artifact) -> OnDevice | None:
    """The comparison on some test images; None where the device is this machine, or the target cannot feed another one.

    Raises:
        DeviceError, BuildError, UnavailableError: see `Connection.ask`.
    """
    if isinstance(run.board, LocalDevice) or boards_of(run.board) or not isinstance(target, Elsewhere):
        return None
    settings = {"images": IMAGES, "threads": run.config.threads, "device": run.config.device}
    stage = run.folder.stage(f"device-{target.name}", "1", settings, (before.key, artifact.file.sha256))

    def ask() -> OnDevice:
        with run.stage(f"answers of {target.name} on {run.config.device}"):
            return _asked(run, target, artifact)

    return stage.once(OnDevice, ask)


def compared(
    device: str, kind: Kind, runtime: str, *, there: FloatArray, here: FloatArray, labels: NDArray[np.int64]
) -> OnDevice:
    """Compares a device's logits (n, classes) for some images, `there`, with this machine's for the same images, `here`."""
    return OnDevice(
        device=device,
        kind=kind,
        runtime=runtime,
        samples=len(labels),
        agreement=float((predictions(there) == predictions(here)).mean()),
        top1=top1(there, labels),
        here_top1=top1(here, labels),
        largest_difference=float(np.abs(there - here).max() / max(float(np.ptp(here)), 1e-12)),
    )


def _asked(run: RunContext, target: Target, artifact: Artifact) -> OnDevice:
    assert isinstance(target, Elsewhere)  # on_device
    test, path = run.loaded.data.test, run.folder.path / artifact.file.path
    picked = evenly_spaced(len(test), IMAGES)
    images = artifact_images(target, test.read(picked), run.loaded.subject.preprocess)
    with target.runner(path, run.config.threads) as predict:
        here = predict(images)
    with run.board.connect() as agent:
        kind = agent.kind()
        model = agent.load(path, target.runtime, run.config.threads)
        with target.runner_through(path, model.run) as predict:
            there = predict(images)
    version = f"{model.package} {model.version}"
    return compared(agent.name, kind, version, there=there, here=here, labels=test.labels[picked])
