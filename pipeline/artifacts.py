"""A target's artifact: built from the pruned network, then judged in its own runtime and timed on its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import nn

from ..devices.timing import TimingSettings
from ..targets.base import BuildRequest, FloatArray, Target
from . import engine_files, engines, golden
from .accuracy import top1
from .graph import LAYERS, canonical
from .images import calibration_batches
from .on_device import on_device
from .references import References
from .rounding import round_weights
from .session import Run
from .store import Stage, atomic_write, file_ref
from .types import Accuracy, Artifact, FileRef, Pattern, Precision, TargetResult, Timing
from .verify import answers, artifact_logits, compare, judge

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
        if engines.needs_device(target):
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


def verified(
    run: Run,
    before: Stage,
    target: Target,
    artifact: Artifact,
    references: References,
) -> TargetResult:
    """Accuracy of the artifact in its own runtime on the test split, its latency on the device, and the gates."""
    config, digest = run.config, artifact.file.sha256
    judged = run.folder.stage(f"accuracy-{target.name}", "1", {}, (before.key, digest, references.logits.sha256))
    timed = run.folder.stage(f"timing-{target.name}", "1", {"threads": config.threads}, (before.key, digest))
    kept = run.folder.stage(f"golden-{target.name}", "1", {"images": golden.IMAGES}, (before.key, digest))
    accuracy, timing, answers_kept = judged.result(Accuracy), timed.result(Timing), kept.result(FileRef)
    if accuracy is None or timing is None or answers_kept is None:
        with run.stage(f"verify {target.name}"):
            if accuracy is None:
                accuracy = _accuracy(run, target, artifact, references)
                judged.finish(accuracy)
            if timing is None:
                timing = _timing(run, target, artifact)
                timed.finish(timing)
            if answers_kept is None:
                answers_kept = _golden(run, target, artifact)
                kept.finish(answers_kept)
    masked = run.pattern is not Pattern.CHANNEL
    seen = on_device(run, before, target, artifact)
    verdict = judge(
        accuracy,
        timing,
        max_drop_pp=config.max_accuracy_drop,
        min_speedup=config.min_speedup,
        masked=masked,
        seen=seen,
        size_bytes=artifact.file.size_bytes,
        max_size_bytes=config.max_size,
    )
    return TargetResult("ok", verdict, artifact, accuracy, timing, answers_kept, seen)


def _accuracy(run: Run, target: Target, artifact: Artifact, references: References) -> Accuracy:
    test = run.loaded.data.test
    found = artifact_logits(target, run.folder.path / artifact.file.path, test, run.loaded.subject.preprocess)
    torch_logits = load_file(run.folder.path / references.logits.path)
    return compare(found, torch_logits["pruned"].numpy(), torch_logits["dense"].numpy(), test.labels)


def _timing(run: Run, target: Target, artifact: Artifact) -> Timing:
    assert artifact.baseline is not None  # every target builds one
    baseline, path = (run.folder.path / file.path for file in (artifact.baseline, artifact.file))
    settings = TimingSettings(threads=run.config.threads, runtime=target.runtime, seed=run.config.seed)
    with run.ui.bar("timing sessions", settings.sessions + 1) as bar:
        device = engines.device_for(target, run.board)
        assert device is not None  # what has no device does not come here
        return device.measure(baseline, path, settings, lambda done, total: bar.advance())


def _golden(run: Run, target: Target, artifact: Artifact) -> FileRef:
    """Some test images with the artifact's answers, beside it."""
    test, prep = run.loaded.data.test, run.loaded.subject.preprocess
    picked = np.unique(np.linspace(0, len(test) - 1, golden.IMAGES).astype(np.int64))
    path = run.folder.path / artifact.file.path
    with target.runner(path) as predict:
        answered = golden.record(predict, test.read(picked), test.labels[picked], prep.mean, prep.std, golden.where(target))
    file = path.with_name("golden.safetensors")
    atomic_write(file, golden.to_bytes(answered))
    return file_ref(file, run.folder.path)
