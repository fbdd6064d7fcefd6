"""The artifact's answers on its device beside those of the same file on this machine: the accuracy that is shipped."""

from __future__ import annotations

import numpy as np

from ...devices.local import LocalDevice
from ...devices.tensorrt.boards_of import boards_of
from ...targets.base import Elsewhere, Target
from ..run_context import Run
from ..run_folder import Stage
from ..task.inference import predictions, top1
from ..task.preprocess import to_input
from ..types import Artifact, OnDevice

IMAGES = 200  # spread evenly over the test split


def on_device(run: Run, before: Stage, target: Target, artifact: Artifact) -> OnDevice | None:
    """The comparison on some test images; None where the device is this machine, or the target cannot feed another one.

    Raises:
        DeviceError, BuildError, UnavailableError: see `AgentSession.ask`.
    """
    if isinstance(run.board, LocalDevice) or boards_of(run.board) or not isinstance(target, Elsewhere):
        return None
    settings = {"images": IMAGES, "threads": run.config.threads, "device": run.config.device}
    stage = run.folder.stage(f"device-{target.name}", "1", settings, (before.key, artifact.file.sha256))
    found = stage.result(OnDevice)
    if found is None:
        with run.stage(f"answers of {target.name} on {run.config.device}"):
            found = _compared(run, target, artifact)
        stage.finish(found)
    return found


def _compared(run: Run, target: Target, artifact: Artifact) -> OnDevice:
    assert isinstance(target, Elsewhere)  # on_device
    test, path = run.loaded.data.test, run.folder.path / artifact.file.path
    picked = np.unique(np.linspace(0, len(test) - 1, IMAGES).astype(np.int64))
    inputs = to_input(test.read(picked), run.loaded.subject.preprocess).numpy()
    with target.runner(path, run.config.threads) as predict:
        here = predict(inputs)
    with run.board.connect() as agent:
        kind = agent.kind()
        model = agent.load(path, target.runtime, run.config.threads)
        with target.runner_through(path, model.run) as predict:
            there = predict(inputs)
    labels = test.labels[picked]
    return OnDevice(
        device=agent.name,
        kind=kind,
        runtime=f"{model.package} {model.version}",
        samples=len(picked),
        agreement=float((predictions(there) == predictions(here)).mean()),
        top1=top1(there, labels),
        here_top1=top1(here, labels),
        largest_difference=float(np.abs(there - here).max() / max(float(np.ptp(here)), 1e-12)),
    )
