"""A target's artifact, built from the pruned network; what int8 needs is chosen on the search split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from ...targets.base import BuildRequest, FloatArray, Target, needs_device
from ..graph.trace import LAYERS, canonical
from ..reconstruct.gptq import round_weights
from ..run_context import Run
from ..run_folder import Stage
from ..task.inference import answers, top1
from ..task.samples import calibration_batches
from ..types import Artifact, Precision
from . import engine_script as engine_files

CALIBRATION_IMAGES = 500


def build(run: Run, before: Stage, target: Target, student: nn.Module, precision: Precision) -> tuple[Artifact, Stage]:
    """The target's artifact in artifacts/TARGET; what int8 needs is chosen on the search split."""
    config, loaded = run.config, run.loaded
    settings = {"target": target.name, "precision": str(precision), "threads": config.threads, "seed": config.seed}
    settings |= {"float_io": True} if config.float_io else {}
    stage = run.folder.stage(f"build-{target.name}", "2", settings, (before.key,))
    artifact = stage.result(Artifact)
    if artifact is not None:
        return artifact, stage
    search_split, prep = loaded.data.search, loaded.subject.preprocess

    def score(predict: Callable[[FloatArray], FloatArray]) -> float:
        return top1(answers(predict, search_split, prep), search_split.labels)

    folder = run.folder.path / "artifacts" / target.name
    folder.mkdir(parents=True, exist_ok=True)
    with run.stage(f"build {target.name}"):
        calibration = calibration_batches(loaded.data, prep, CALIBRATION_IMAGES, config.seed + 2)
        request = BuildRequest(
            module=student,
            dense=loaded.module,
            image_shape=loaded.subject.data.image_shape,
            classes=loaded.subject.data.classes,
            precision=precision,
            calibration=calibration,
            score=score,
            folder=folder,
            threads=config.threads,
            mean=prep.mean,
            std=prep.std,
            float_io=config.float_io,
            rounded=partial(round_weights, student, calibration),
            rewritten=_rewritten(loaded.module, loaded.subject.data.image_shape),
            pattern=run.pattern,
        )
        artifact = target.build(request)
        if needs_device(target):
            engine_files.write(folder, artifact, request)
    artifact = _under(artifact, folder.relative_to(run.folder.path))
    stage.finish(artifact)
    return artifact, stage


def _rewritten(dense: nn.Module, image_shape: tuple[int, int, int]) -> nn.Module | None:
    """The dense network as the search knows it, where that has layers in the place of zero padding."""
    net = canonical(dense, image_shape)
    layers = [sum(isinstance(m, LAYERS) for m in network.modules()) for network in (dense, net)]
    return net if layers[1] > layers[0] else None


def _under(artifact: Artifact, folder: Path) -> Artifact:
    """Paths relative to the run folder instead of the target's."""
    baseline = artifact.baseline and replace(artifact.baseline, path=(folder / artifact.baseline.path).as_posix())
    return replace(artifact, file=replace(artifact.file, path=(folder / artifact.file.path).as_posix()), baseline=baseline)
