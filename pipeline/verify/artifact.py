"""Judges an artifact in its own runtime, times it on its device, keeps its golden samples."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from ...devices.access import settings_of
from ...devices.measure.timing import TimingSettings
from ...targets.base import Target
from ..files import atomic_write, file_ref
from ..options import Pattern
from ..run_context import RunContext
from ..run_folder import Stage
from ..types import Accuracy, Artifact, FileRef, Kind, TargetResult, Timing
from . import golden
from .device_answers import on_device
from .gates import Allowed, judge
from .places import device_for
from .references import Networks, accuracy_here, accuracy_stage
from .statistics import evenly_spaced

MOST_SESSIONS = 25  # of a reported speedup: beside two busy processes ten repetitions differ by 4 %, with 10 sessions by 8 %


def verified(
    run: RunContext, before: Stage, target: Target, artifact: Artifact, networks: Networks, limits: Allowed
) -> TargetResult:
    """Accuracy of the artifact in its own runtime on the test split, its latency on the device, and the gates."""
    inputs = (before.key, artifact.file.sha256)
    tested = accuracy_stage(run, before, artifact)
    settings = {"threads": run.config.threads} | settings_of(device_for(target, run.board))
    timed = run.folder.stage(f"timing-{target.name}", "1", settings, inputs)
    kept = run.folder.stage(f"golden-{target.name}", "1", {"images": golden.SAMPLES}, inputs)
    done = all(stage.result(kind) is not None for stage, kind in ((tested, Accuracy), (timed, Timing), (kept, FileRef)))
    with nullcontext() if done else run.stage(f"verify {target.name}"):
        accuracy = tested.once(Accuracy, partial(accuracy_here, run, target, artifact, networks, Kind.MEASURED))
        timing = timed.once(Timing, partial(_timing, run, target, artifact))
        samples = kept.once(FileRef, partial(_golden, run, target, artifact))
    seen = on_device(run, before, target, artifact)
    masked = run.pattern is not Pattern.CHANNEL
    verdict = judge(limits, accuracy, timing, size_bytes=artifact.file.size_bytes, masked=masked, seen=seen)
    return TargetResult("ok", verdict, artifact, accuracy, timing, samples, seen)


def _timing(run: RunContext, target: Target, artifact: Artifact) -> Timing:
    assert artifact.baseline is not None  # every target builds one
    baseline, path = (run.folder.path / file.path for file in (artifact.baseline, artifact.file))
    settings = TimingSettings(
        threads=run.config.threads, runtime=target.runtime, seed=run.config.seed, most_sessions=MOST_SESSIONS
    )
    with run.ui.bar("timing sessions", settings.sessions + 1) as bar:
        device = device_for(target, run.board)
        assert device is not None  # what has no device does not come here

        def tell(done: int, total: int) -> None:
            more = settings.sessions < done < total
            bar.advance(0 if more else 1, f"the interval is wide: session {done}" if more else "")

        return device.measure(baseline, path, settings, tell)


def _golden(run: RunContext, target: Target, artifact: Artifact) -> FileRef:
    """Some test images with the artifact's answers, beside it."""
    picked = evenly_spaced(len(run.loaded.data.test), golden.SAMPLES)
    batch, prep = run.loaded.data.test.batch(picked), run.loaded.subject.preprocess
    path = run.folder.path / artifact.file.path
    with target.runner(path) as predict:
        outputs = golden.as_tuple(predict(batch.artifact_inputs(target)))
    answered = golden.of_batch(batch, outputs, prep, golden.where(target))
    file = path.with_name("golden.safetensors")
    atomic_write(file, golden.to_bytes(answered))
    return file_ref(file, run.folder.path)
