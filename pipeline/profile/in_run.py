"""Measures an artifact's memory and its time by layer in a run, once its latency is known."""

from __future__ import annotations

from ...devices.access import settings_of
from ...devices.measure.timing import TimingSettings
from ...devices.measure.usage import Usage, measured_usage
from ...targets.base import Target
from ..errors import BuildError, DeviceError, UnavailableError
from ..run_context import RunContext
from ..run_folder import Stage
from ..types import TargetResult
from ..verify.places import device_for
from .layer_names import merged


def usage_of(run: RunContext, before: Stage, target: Target, result: TargetResult) -> Usage | None:
    """Returns memory and times by layer of a target's artifact; None where it is an engine, or has no measured latency.

    A device that fails here costs only these figures: the reason is among the run's notes.
    """
    artifact, latency = result.artifact, result.latency
    if target.needs_device or artifact is None or artifact.baseline is None or latency is None:
        return None
    settings = TimingSettings(threads=run.config.threads, runtime=target.runtime, seed=run.config.seed)
    dense, path = (run.folder.path / file.path for file in (artifact.baseline, artifact.file))
    device = device_for(target, run.board)
    kept = {"threads": settings.threads} | settings_of(device)
    stage = run.folder.stage(f"usage-{target.name}", "1", kept, (before.key, artifact.file.sha256))
    found: Usage | None = stage.result(Usage)
    if found is not None:
        return found
    assert device is not None  # its latency was measured there
    try:
        with run.stage(f"memory and layers {target.name}"), device.connect() as agent:
            dense_peak = measured_usage(agent, dense, settings, None)[0]
            peak, layers, note = measured_usage(agent, path, settings, latency.artifact.p50_ms)
    except (BuildError, DeviceError, UnavailableError) as error:
        run.notes.append(f"{target.name}: memory and times by layer were not measured: {error}.")
        return None
    if note:
        stage.note(f"{target.name}: {note}.")
    found = Usage(dense_peak, peak, merged(path, layers))
    stage.finish(found)
    return found
