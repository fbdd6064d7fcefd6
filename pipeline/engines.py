"""Targets whose artifact is an engine: built, judged and timed on a board or a GPU of this machine, or left unbuilt."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from ..devices import tensorrt_loop
from ..devices.access import CLASS
from ..devices.boards import Board
from ..devices.device import Device
from ..devices.engines import SPARSITY_KEY, Engine, Engines
from ..devices.here import HereTransport
from ..devices.latency_cache import cache_folder
from ..devices.local import LocalDevice
from ..devices.tensorrt_device import TensorRtDevice
from ..devices.timing import TimingSettings
from ..targets.base import FloatArray, Target
from .config import Config
from .errors import BuildError, InputError, UnavailableError
from .preprocess import to_input
from .references import References
from .session import Run
from .store import Stage, atomic_write, file_ref
from .types import Accuracy, Artifact, Kind, SearchResult, TargetResult, Timing, Verdict
from .verify import artifact_logits, compare, judge

ONE_BY_ONE = 100  # test images, where each takes a process of its own on the board
BATCH = 500  # images sent at once
ABSENT = (
    "no engine was built: there is no board with TensorRT (--device NAME) and no TensorRT with a CUDA GPU on this machine;"
    " artifacts/{name}/build.sh builds it on the board"
)


def needs_device(target: Target) -> bool:
    """Whether a target's artifact is finished on the device it is for."""
    return bool(getattr(target, "needs_device", False))


def device_for(target: Target, board: Device) -> Device | None:
    """Where a target's artifact runs: on the board asked for where that can, else on this machine; None where neither can."""
    if needs_device(target):
        return board if isinstance(board, TensorRtDevice) else gpu_here()
    return LocalDevice() if isinstance(board, TensorRtDevice) else board


def gpu_here() -> TensorRtDevice | None:
    """A CUDA GPU of this machine with TensorRT; None where there is none."""
    if not torch.cuda.is_available():
        return None
    programs: list[Sequence[str]] = [("trtexec",)] if shutil.which("trtexec") else []
    programs += [(sys.executable, tensorrt_loop.__file__)] if find_spec("tensorrt") is not None else []
    if not programs:
        return None
    name = f"{torch.cuda.get_device_name()} (this machine, not a Jetson)"
    board = Board(name, ("jetson",), "local", runtime="tensorrt", python=sys.executable)
    folder = cache_folder().parent / "engines"
    return TensorRtDevice(board, HereTransport(name, str(folder)), programs)


def places(config: Config, chosen: Sequence[Target], board: Device) -> dict[str, Device | None]:
    """Where each target's artifact runs, by the target's name; see `device_for`.

    Raises:
        UnavailableError: nowhere, and the artifact is required.
        InputError: a budget in milliseconds without anything to measure on, or a class of boards for what belongs to one.
    """
    found = {target.name: device_for(target, board) for target in chosen}
    lone = [target.name for target in chosen if needs_device(target)]
    if lone and config.device.startswith(CLASS):
        raise InputError(f"--device {config.device} with --target {lone[0]}", expected="one board: an engine belongs to one")
    absent = [name for name in lone if found[name] is None]
    if absent and config.require_artifact:
        raise UnavailableError(
            f"the engine of target {absent[0]}",
            found="no board with TensorRT, and no TensorRT with a CUDA GPU on this machine",
            expected="one of them, with --require-artifact",
            do="name a board with --device, see `edge-compress devices`",
        )
    if config.latency_budget.ratio is None and not any(found.values()):
        raise InputError(
            f"--latency-budget {config.latency_budget}",
            found="no device to measure milliseconds on",
            expected="a share of the dense model's latency, such as 0.5",
        )
    return found


def remarks(found: SearchResult) -> list[str]:
    """What the report has to say of a search that measured nothing."""
    if found.best.latency_kind is not Kind.ESTIMATED:
        return []
    return [
        "The search had no board: what it calls latency is estimated, a roofline with a floor for each layer, and tells"
        " structures of one precision from each other. It is no time of any device, and what int8 saves is not in it"
        " (docs/jetson.md)."
    ]


def unbuilt(run: Run, before: Stage, target: Target, artifact: Artifact, references: References, why: str) -> TargetResult:
    """What is known without an engine: the accuracy of the file's arithmetic. No gate on latency can be passed."""
    accuracy = _simulated(run, before, target, artifact, references)
    reasons = [why, *_over(accuracy, run.config.max_accuracy_drop)]
    return TargetResult("not_built", Verdict(False, tuple(reasons)), artifact, accuracy)


def breaks_a_gate(result: TargetResult, max_drop_pp: float) -> bool:
    """Whether a result makes a run fail: what was not built does so only by what is known of it all the same."""
    if result.status == "not_built":
        return result.accuracy is None or bool(_over(result.accuracy, max_drop_pp))
    return not result.verdict.passed


def finished(
    run: Run, before: Stage, target: Target, artifact: Artifact, references: References, device: TensorRtDevice
) -> TargetResult:
    """The engine, its accuracy on the test split and its latency, all on the device; and the gates.

    What TensorRT itself refuses to build is a failed target. An engine that a stand-in made is no engine.
    """
    config = run.config
    settings = {"device": config.device, "name": device.name}
    stage = run.folder.stage(f"engine-{target.name}", "1", settings, (before.key, artifact.file.sha256))
    judged = run.folder.stage(f"accuracy-{target.name}", "2", settings, (stage.key, references.logits.sha256))
    timed = run.folder.stage(f"timing-{target.name}", "2", settings, (stage.key,))
    engine, accuracy, timing = stage.result(Artifact), judged.result(Accuracy), timed.result(Timing)
    if engine is None or accuracy is None or timing is None:
        with run.stage(f"engine of {target.name} on {device.name}"):
            try:
                if engine is None:
                    engine = _built(run, artifact, device)
                    stage.finish(engine)
                if accuracy is None:
                    accuracy = _accuracy(run, engine, references, device)
                    judged.finish(accuracy)
                if timing is None:
                    timing = _timing(run, engine, device)
                    timed.finish(timing)
            except _SimulatedError as error:
                return unbuilt(run, before, target, artifact, references, f"no engine was built: {error}")
            except BuildError as error:
                return TargetResult("failed", Verdict(False, (str(error),)), artifact)
    verdict = judge(accuracy, timing, max_drop_pp=config.max_accuracy_drop, min_speedup=config.min_speedup)
    return TargetResult("ok", verdict, engine, accuracy, timing)


class _SimulatedError(Exception):
    """A stand-in for trtexec was at work."""


def _built(run: Run, artifact: Artifact, device: TensorRtDevice) -> Artifact:
    """The engine's file beside the file it was built from, with its layers' times; of two with and without sparse kernels the
    faster.
    """
    assert artifact.baseline is not None  # every target builds one
    model, baseline = (run.folder.path / ref.path for ref in (artifact.file, artifact.baseline))
    notes: list[str] = []
    source = model
    if "two_four_layers" in artifact.options:
        source, said = _faster_kernels(run, model, device)
        notes.append(said)
    with device.engines() as engines:
        made = {path: engines.engine(path) for path in (source, baseline)}
        _require_real(engines, list(made.values()))
        files = {}
        for path, name in ((source, "model"), (baseline, "baseline")):
            file = model.with_name(f"{name}.engine")
            engines.fetch(made[path], file)
            files[name] = file_ref(file, run.folder.path)
        notes += _layers(engines, {"model": made[source], "baseline": made[baseline]}, model.with_name("layers.json"))
        version = str(engines.version)
    options = artifact.options | {
        "tensorrt": version,
        "built_on": device.name,
        "onnx": source.relative_to(run.folder.path).as_posix(),
        "onnx_baseline": artifact.baseline.path,
    }
    notes.append(f"engine built on {device.name} by TensorRT {version}: for this GPU, this TensorRT and this power mode only")
    return replace(
        artifact,
        file=files["model"],
        baseline=files["baseline"],
        format="engine",
        notes=(*artifact.notes, *notes),
        options=options,
    )


def _faster_kernels(run: Run, sparse: Path, device: TensorRtDevice) -> tuple[Path, str]:
    """Of one file with sparse kernels allowed and not, the one whose engine is faster on the device; and what was found."""
    import onnx

    plain = sparse.with_name("model-dense-kernels.onnx")
    model = onnx.load(sparse)
    for entry in model.metadata_props:
        if entry.key == SPARSITY_KEY:
            entry.value = "disable"
    atomic_write(plain, model.SerializeToString(deterministic=True))
    with device.engines() as engines:
        made = [engines.engine(path) for path in (sparse, plain)]
        _require_real(engines, made)
        found = made[0].sparsity
    timing = device.measure(plain, sparse, TimingSettings(runtime="tensorrt", seed=run.config.seed))
    (low, high), median = timing.speedup.ci95, timing.speedup.median
    counts = f"2:4: {len(found.eligible)} layers eligible, sparse kernels picked for {len(found.picked)}"
    told = f"{counts}; with them {median:.2f} times as fast as without (95 % interval {low:.2f} to {high:.2f})"
    return (sparse, f"{told}: kept") if low > 1.0 else (plain, f"{told}: not faster, so left out")


def _layers(engines: Engines, made: dict[str, Engine], file: Path) -> list[str]:
    """Times by layer, in a file; a note where there are none."""
    try:
        found = {name: [vars(layer) for layer in engines.layers(engine)] for name, engine in made.items()}
    except UnavailableError as error:
        return [f"no {error}"]
    atomic_write(file, json.dumps(found, indent=1) + "\n")
    return [f"times by layer, with the profiler attached: {file.name}"]


def _accuracy(run: Run, engine: Artifact, references: References, device: TensorRtDevice) -> Accuracy:
    """The engine's own answers to the test split, or to a part of it where each image takes a process of its own."""
    test, prep = run.loaded.data.test, run.loaded.subject.preprocess
    source = run.folder.path / engine.options["onnx"]
    with device.engines() as engines:
        made = engines.engine(source)
        _require_real(engines, [made])
        picked = np.arange(len(test)) if engines.in_bulk() else np.unique(np.linspace(0, len(test) - 1, ONE_BY_ONE).astype(int))
        blocks = (picked[at : at + BATCH] for at in range(0, len(picked), BATCH))
        found = np.concatenate([engines.outputs(made, to_input(test.read(block), prep).numpy()) for block in blocks])
    return _compared(run, found, picked, references, Kind.MEASURED)


def _timing(run: Run, engine: Artifact, device: TensorRtDevice) -> Timing:
    """Latency of the engine against the dense float one, and what the board takes meanwhile where that can be read."""
    model, baseline = (run.folder.path / engine.options[key] for key in ("onnx", "onnx_baseline"))
    settings = TimingSettings(runtime="tensorrt", seed=run.config.seed)
    with run.ui.bar("timing sessions", settings.sessions + 1) as bar:
        timing = device.measure(baseline, model, settings, lambda done, total: bar.advance())
    with device.engines() as engines:
        power = {name: engines.power(engines.engine(path)) for name, path in (("artifact", model), ("dense", baseline))}
    told = {f"power_{name}": str(value) for name, value in power.items() if value is not None}
    return replace(timing, environment=timing.environment | (told or {"power": "cannot be read"}))


def _require_real(engines: Engines, made: list[Engine]) -> None:
    for engine in made:
        try:
            engines.require_real(engine)
        except UnavailableError as error:
            raise _SimulatedError(str(error)) from error


def _simulated(run: Run, before: Stage, target: Target, artifact: Artifact, references: References) -> Accuracy:
    stage = run.folder.stage(f"accuracy-{target.name}", "1", {}, (before.key, artifact.file.sha256, references.logits.sha256))
    accuracy = stage.result(Accuracy)
    if accuracy is None:
        with run.stage(f"simulate {target.name}"):
            test = run.loaded.data.test
            found = artifact_logits(target, run.folder.path / artifact.file.path, test, run.loaded.subject.preprocess)
            kind = Kind(getattr(target, "simulation", Kind.ESTIMATED))
            accuracy = _compared(run, found, np.arange(len(test)), references, kind)
        stage.finish(accuracy)
    return accuracy


def _compared(run: Run, found: FloatArray, picked: NDArray[np.int64], references: References, kind: Kind) -> Accuracy:
    kept = load_file(run.folder.path / references.logits.path)
    pruned, dense = (kept[name].numpy()[picked] for name in ("pruned", "dense"))
    return compare(found, pruned, dense, run.loaded.data.test.labels[picked], kind)


def _over(accuracy: Accuracy, max_drop_pp: float) -> list[str]:
    if accuracy.drop_pp <= max_drop_pp:
        return []
    return [f"accuracy: top-1 fell by {accuracy.drop_pp:.2f} points ({accuracy.kind}), at most {max_drop_pp:g} allowed"]
