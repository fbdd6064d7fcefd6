"""The dense network that latencies are compared with, in the search and in the report: the faster of its forms, chosen once.

A zero-padded shortcut is a slice and a padding as the user wrote it, and a 1x1 convolution in the captured network. Which of
them is faster depends on the runtime; a speedup over the slower one would be a gift of the conversion.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ...devices.access import settings_of
from ...devices.device import Device
from ...devices.measure.timing import TimingSettings
from ...targets.base import Interface, Target
from ..files import atomic_write, file_ref
from ..run_context import RunContext
from ..types import Baseline, DenseForm

AS_GIVEN = "the network as given"
CONVOLUTIONS = "zero-padded shortcuts as 1x1 convolutions"
SESSIONS = 3  # enough to tell which of two forms is faster


def dense_baseline(run: RunContext, subject_key: str, target: Target, net: nn.Module, device: Device | None) -> Baseline:
    """The target's dense float baseline, kept in a stage of its own.

    Args:
        run: whose network and device it is.
        subject_key: of the stage that gave the trained network.
        target: whose format the file has.
        net: the network as the search knows it.
        device: that tells which form is faster; without one it is the form with convolutions, which estimates are made for.

    Raises:
        UnavailableError, BuildError: see `Target.build`.
        DeviceError: see `Device.measure`.
    """
    settings = {"threads": run.config.threads} | ({} if device is None else {"device": run.config.device} | settings_of(device))
    stage = run.folder.stage(f"baseline-{target.name}", "4", settings, (subject_key,))
    found = stage.result(Baseline)
    if found is not None:
        return found
    subject = run.loaded.subject
    info, prep = subject.data, subject.preprocess
    with run.stage(f"dense baseline {target.name}"):
        files: dict[str, Path] = {}
        for name, module in _forms(run.loaded.module, net).items():
            files[name] = stage.folder / f"{'given' if name == AS_GIVEN else 'convolutions'}.model"
            atomic_write(files[name], target.baseline(module, Interface(subject.signature, info.classes, prep.mean, prep.std)))
        form = DenseForm(AS_GIVEN) if len(files) == 1 else _faster(run, target, files, device)
    found = Baseline(file_ref(files[form.form], run.folder.path), form)
    stage.finish(found)
    return found


def dense_module(run: RunContext, net: nn.Module, baseline: Baseline) -> nn.Module:
    """The dense network in the form that a baseline has; `net` as in `dense_baseline`."""
    return net if baseline.form.form == CONVOLUTIONS else run.loaded.module


def _forms(dense: nn.Module, net: nn.Module) -> dict[str, nn.Module]:
    """The network as given, and as the search knows it where that has layers in the place of zero padding."""
    given, searched = (sum(isinstance(m, nn.Conv2d) for m in network.modules()) for network in (dense, net))
    return {AS_GIVEN: dense} | ({CONVOLUTIONS: net} if searched > given else {})


def _faster(run: RunContext, target: Target, files: dict[str, Path], device: Device | None) -> DenseForm:
    if device is None:
        return DenseForm(CONVOLUTIONS, AS_GIVEN)
    settings = TimingSettings(
        threads=run.config.threads, runtime=target.runtime, seed=run.config.seed, sessions=SESSIONS, max_seconds=5.0
    )
    with run.ui.bar("timing the dense network's forms", SESSIONS + 1) as bar:
        timing = device.measure(files[AS_GIVEN], files[CONVOLUTIONS], settings, lambda done, total: bar.advance())
    if timing.speedup.median > 1.0:
        return DenseForm(CONVOLUTIONS, AS_GIVEN, timing.speedup)
    return DenseForm(AS_GIVEN, CONVOLUTIONS, timing.speedup.inverted())
