"""An engine on one board, from its file to its figures: built, asked, compared, timed; each step is kept in the run folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from ....devices.access import settings_of
from ....devices.measure.timing import TimingSettings
from ....devices.tensorrt.device import TensorRtDevice
from ....devices.tensorrt.engines import Engine, Engines, IOTensors
from ....targets.base import Target
from ...errors import UnavailableError
from ...files import atomic_write, file_ref
from ...network.calling import tensors_of
from ...options import SPARSITY_KEY
from ...run_context import RunContext
from ...run_folder import Stage
from ...types import Artifact, FileRef, Kind, OnDevice, Timing
from .. import golden
from ..device_answers import IMAGES, compared
from ..statistics import evenly_spaced

ONE_BY_ONE = 100  # test samples, where each takes a process of its own on the board
BATCH = 500  # samples sent at once


class SimulatedError(Exception):
    """The program is a stand-in for trtexec, not TensorRT."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Outputs for some test samples."""

    picked: NDArray[np.int64]  # positions in the test split, ascending
    outputs: tuple[NDArray[Any], ...]  # (n, ...) each
    board: str  # that gave them
    at: golden.Where


@dataclass(frozen=True)
class EngineWork:
    """The work on one board, step by step, kept in the run folder under this board's name."""

    run: RunContext
    before: Stage
    target: Target
    artifact: Artifact
    device: TensorRtDevice

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        kinds = {"answers": FileRef, "device": OnDevice, "timing": Timing, "golden": FileRef}
        begun = self._engine_stage.result(Artifact) is not None
        return begun and all(self._stage(name).result(kind) is not None for name, kind in kinds.items())

    def do(self) -> None:
        """Runs the steps that are not finished.

        Raises:
            BoardError: the board failed.
            SimulatedError: the board has a stand-in for trtexec.
            BuildError, DeviceError, UnavailableError: see `Engines`.
        """
        with self.run.stage(f"engine of {self.target.name} on {self.device.name}"):
            for step in (self.engine, self.answers, self.beside_file, self.timing, self.golden):
                step()

    def forget(self) -> None:
        """Removes what this board has built, so that another one starts over."""
        shutil.rmtree(self._engine_stage.folder, ignore_errors=True)

    def engine(self) -> Artifact:
        """The engine's file."""
        return self._engine_stage.once(Artifact, lambda: _built(self.run, self.artifact, self.device))

    def answers(self) -> Answers:
        """Its answers to test images."""
        stage = self._stage("answers")
        file = stage.once(FileRef, lambda: _keep(self.run, stage, _asked(self.run, self.engine(), self.device)))
        return _kept(self.run.folder.path / file.path)

    def beside_file(self) -> OnDevice:
        """Its answers compared with what the file it was built from computes on this machine."""
        source = self.run.folder.path / self.engine().options["onnx"]
        return self._stage("device").once(OnDevice, lambda: _beside_file(self.run, self.target, source, self.answers()))

    def timing(self) -> Timing:
        """Its latency."""
        return self._stage("timing").once(Timing, lambda: _timing(self.run, self.engine(), self.device))

    def golden(self) -> FileRef:
        """Its golden samples."""
        folder = (self.run.folder.path / self.engine().file.path).parent
        return self._stage("golden").once(FileRef, lambda: _golden_images(self.run, self.answers(), folder))

    @property
    def _engine_stage(self) -> Stage:
        settings = {"device": self.run.config.device, "name": self.device.name} | settings_of(self.device)
        inputs = (self.before.key, self.artifact.file.sha256)
        return self.run.folder.stage(f"engine-{self.target.name}", "2", settings, inputs)

    def _stage(self, name: str) -> Stage:
        """The stage of one step with this very engine file: two builds of one file differ."""
        inputs = (self._engine_stage.key, self.engine().file.sha256)
        return self.run.folder.stage(f"{name}-{self.target.name}", "4", {}, inputs)


def _built(run: RunContext, artifact: Artifact, device: TensorRtDevice) -> Artifact:
    """The engine beside the file it was built from, with its layers' times; with or without sparse kernels, the faster."""
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


def _faster_kernels(run: RunContext, sparse: Path, device: TensorRtDevice) -> tuple[Path, str]:
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


def _asked(run: RunContext, engine: Artifact, device: TensorRtDevice) -> Answers:
    """The engine's answers to the test split, or to a part of it where each sample takes a process of its own."""
    test, io = run.loaded.data.test, IOTensors(engine.inputs, engine.outputs)
    with device.engines() as engines:
        made = engines.engine(run.folder.path / engine.file.path)  # the file that is shipped, not one built again
        _require_real(engines, [made])
        picked = np.arange(len(test)) if engines.in_bulk() else evenly_spaced(len(test), ONE_BY_ONE)
        blocks = (picked[at : at + BATCH] for at in range(0, len(picked), BATCH))
        parts = [engines.outputs(made, golden.as_tuple(test.batch(block).arrays), io) for block in blocks]
        outputs = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
        return Answers(picked, outputs, engines.name, golden.where_on(engines))


def _keep(run: RunContext, stage: Stage, answers: Answers) -> FileRef:
    file = stage.folder / "answers.safetensors"
    tensors = {f"outputs_{k}": np.ascontiguousarray(output) for k, output in enumerate(answers.outputs)}
    tensors["picked"] = answers.picked
    atomic_write(file, save(tensors, metadata={"board": answers.board, **asdict(answers.at)}))
    return file_ref(file, run.folder.path)


def _kept(path: Path) -> Answers:
    with safe_open(path, framework="numpy") as file:
        notes = file.metadata()
        board = notes.pop("board")
        outputs = tuple(file.get_tensor(f"outputs_{k}") for k in range(len(file.keys()) - 1))
        return Answers(file.get_tensor("picked"), outputs, board, golden.Where(**notes))


def _beside_file(run: RunContext, target: Target, source: Path, answers: Answers) -> OnDevice:
    chosen = evenly_spaced(len(answers.picked), IMAGES)
    test, picked = run.loaded.data.test, answers.picked[chosen]
    with target.runner(source) as predict:
        here = tensors_of(predict(test.batch(picked).artifact_inputs(target)))
    there, version = tensors_of(tuple(output[chosen] for output in answers.outputs)), answers.at.version
    return compared(run, picked, answers.board, Kind.MEASURED, version, there=there, here=here)


def _golden_images(run: RunContext, answers: Answers, folder: Path) -> FileRef:
    """Some of the images with the engine's answers, in a file of the artifact's folder."""
    chosen = evenly_spaced(len(answers.picked), golden.SAMPLES)
    batch, prep = run.loaded.data.test.batch(answers.picked[chosen]), run.loaded.subject.preprocess
    found = golden.of_batch(batch, tuple(output[chosen] for output in answers.outputs), prep, answers.at)
    file = folder / "golden.safetensors"
    atomic_write(file, golden.to_bytes(found))
    return file_ref(file, run.folder.path)


def _timing(run: RunContext, engine: Artifact, device: TensorRtDevice) -> Timing:
    """Latency of the engine against the dense float one, with the board's power draw where that can be read."""
    assert engine.baseline is not None  # _built
    model, baseline = (run.folder.path / ref.path for ref in (engine.file, engine.baseline))  # the files that are shipped
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
            raise SimulatedError(str(error)) from error
