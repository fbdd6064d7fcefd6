"""Judges an artifact in its own runtime, times it on its device, keeps its golden samples."""

from __future__ import annotations

import numpy as np
from safetensors.torch import load_file

from ...devices.measure.timing import TimingSettings
from ...targets.base import Target
from ..files import atomic_write, file_ref
from ..run_context import Run
from ..run_folder import Stage
from ..task.inference import artifact_logits
from ..types import Accuracy, Artifact, FileRef, Pattern, TargetResult, Timing
from . import golden
from .device_answers import on_device
from .gates import compare, judge
from .places import device_for
from .references import References


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
        device = device_for(target, run.board)
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
