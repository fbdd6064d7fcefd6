"""A target's artifact, built from the pruned network; what int8 needs is chosen on the search split."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from ...devices.access import settings_of
from ...devices.device import Device
from ...devices.measure.timing import TimingSettings
from ...targets.base import BuildRequest, Target
from ..options import Precision
from ..reconstruct.gptq import round_weights
from ..run_context import RunContext
from ..run_folder import Stage
from ..task.samples import calibration_set
from ..task.task import score_on
from ..types import Artifact, Baseline, Speedup
from . import engine_script as engine_files
from .precision import built_faster

CALIBRATION_SAMPLES = 500
MAX_DROP = 0.3  # points that int8 may cost on the search split before more is tried


def build(
    run: RunContext,
    before: Stage,
    target: Target,
    student: nn.Module,
    precision: Precision,
    baseline: Baseline,
    device: Device | None,
) -> tuple[Artifact, Stage]:
    """The target's artifact of `student` (from the stage `before`) in artifacts/TARGET, and the stage that keeps it.

    A copy of the baseline goes beside it. Where there is a choice of files, `device` measures which one is faster.

    Raises:
        UnavailableError, BuildError: see `Target.build`.
    """
    config = run.config
    settings = {"target": target.name, "precision": str(precision), "threads": config.threads, "seed": config.seed}
    settings |= ({"float_io": True} if config.float_io else {}) | settings_of(device)
    stage = run.folder.stage(f"build-{target.name}", "9", settings, (before.key, baseline.file.sha256))
    artifact = stage.result(Artifact)
    if artifact is not None:
        return artifact, stage

    def speedup(slow: Path, fast: Path) -> Speedup:
        assert device is not None  # below
        timing = TimingSettings(threads=config.threads, runtime=target.runtime, seed=config.seed)
        return device.measure(slow, fast, timing).speedup

    folder = run.folder.path / "artifacts" / target.name
    folder.mkdir(parents=True, exist_ok=True)
    with run.stage(f"build {target.name}"), stage.noting():
        request = _request(run, stage, target, student, precision, baseline, folder)
        request = replace(request, pattern=run.pattern, speedup=None if device is None else speedup)
        artifact = replace(built_faster(run, stage, target, request, device), dense_form=baseline.form)
        if target.needs_device:
            engine_files.write(folder, artifact, request)
    artifact = _under(artifact, folder.relative_to(run.folder.path))
    stage.finish(artifact)
    return artifact, stage


def unpruned(
    run: RunContext, subject_key: str, target: Target, dense: nn.Module, precision: Precision, baseline: Baseline
) -> tuple[Artifact, Stage]:
    """The dense network as the target builds it in an artifact's precision, and the stage that keeps it: int8 without pruning.

    Raises:
        UnavailableError, BuildError: see `Target.build`.
    """
    settings = {"precision": str(precision), "threads": run.config.threads, "seed": run.config.seed}
    settings |= {"float_io": True} if run.config.float_io else {}
    stage = run.folder.stage(f"unpruned-{target.name}", "6", settings, (subject_key, baseline.file.sha256))
    artifact = stage.result(Artifact)
    if artifact is None:
        with run.stage(f"unpruned {target.name}"), stage.noting():
            artifact = target.build(_request(run, stage, target, dense, precision, baseline, stage.folder))
        artifact = _under(artifact, stage.folder.relative_to(run.folder.path))
        stage.finish(artifact)
    return artifact, stage


def _request(
    run: RunContext, stage: Stage, target: Target, module: nn.Module, precision: Precision, baseline: Baseline, folder: Path
) -> BuildRequest:
    config, loaded = run.config, run.loaded
    prep, data = loaded.subject.preprocess, loaded.data
    draw = partial(calibration_set, data.train, count=CALIBRATION_SAMPLES, seed=config.seed + 2)
    return BuildRequest(
        module=module,
        baseline=(run.folder.path / baseline.file.path).read_bytes(),
        signature=loaded.subject.signature,
        classes=loaded.subject.data.classes,
        precision=precision,
        calibration=draw(target),
        score=score_on(loaded.task, target, data.search, loaded.module),
        unit=loaded.subject.metric.unit,
        max_drop=MAX_DROP if loaded.subject.metric.unit == "%" else None,
        folder=folder,
        threads=config.threads,
        mean=prep.mean,
        std=prep.std,
        float_io=config.float_io,
        rounded=partial(round_weights, module, draw(None), compute=run.compute, note=stage.note),
    )


def _under(artifact: Artifact, folder: Path) -> Artifact:
    """Paths relative to the run folder instead of the target's."""
    baseline = artifact.baseline and replace(artifact.baseline, path=(folder / artifact.baseline.path).as_posix())
    return replace(artifact, file=replace(artifact.file, path=(folder / artifact.file.path).as_posix()), baseline=baseline)
