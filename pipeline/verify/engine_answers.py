"""What an engine answers on its board to test images, asked once, and what follows from it: its accuracy, how far it agrees with
the file it was built from, its golden images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save

from ...devices.tensorrt.engines import Engine, Engines
from ...targets.base import FloatArray, Target
from ..files import atomic_write, file_ref
from ..run_context import Run
from ..run_folder import Stage
from ..task.inference import predictions, top1
from ..task.preprocess import to_input
from ..types import Accuracy, FileRef, Kind, OnDevice
from . import golden
from .device_answers import IMAGES
from .gates import compare
from .references import References

ONE_BY_ONE = 100  # test images, where each takes a process of its own on the board
BATCH = 500  # images sent at once


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits of some test images."""

    picked: NDArray[np.int64]  # positions in the test split, ascending
    logits: FloatArray  # (n, classes)
    board: str  # that gave them
    at: golden.Where


def ask(run: Run, engines: Engines, engine: Engine) -> Answers:
    """The engine on the test split, or on a part of it where each image takes a process of its own.

    Raises:
        UnavailableError: a stand-in made the engine.
        DeviceError: the board failed.
    """
    test, prep = run.loaded.data.test, run.loaded.subject.preprocess
    picked = np.arange(len(test)) if engines.in_bulk() else _spread(len(test), ONE_BY_ONE)
    blocks = (picked[at : at + BATCH] for at in range(0, len(picked), BATCH))
    found = np.concatenate([engines.outputs(engine, to_input(test.read(block), prep).numpy()) for block in blocks])
    return Answers(picked, found, engines.name, golden.where_on(engines))


def keep(run: Run, stage: Stage, answers: Answers) -> FileRef:
    """The answers in a file of the stage's folder."""
    file = stage.folder / "answers.safetensors"
    tensors: dict[str, NDArray[Any]] = {"picked": answers.picked, "logits": np.ascontiguousarray(answers.logits)}
    atomic_write(file, save(tensors, metadata={"board": answers.board, **asdict(answers.at)}))
    return file_ref(file, run.folder.path)


def kept(path: Path) -> Answers:
    """The answers in a file that `keep` wrote."""
    with safe_open(path, framework="numpy") as file:
        notes = file.metadata()
        board = notes.pop("board")
        return Answers(file.get_tensor("picked"), file.get_tensor("logits"), board, golden.Where(**notes))


def accuracy(run: Run, answers: Answers, references: References) -> Accuracy:
    """The engine's accuracy on the images that were asked, beside the PyTorch networks' on the same."""
    known = load_file(run.folder.path / references.logits.path)
    pruned, dense = (known[name][answers.picked] for name in ("pruned", "dense"))
    return compare(answers.logits, pruned, dense, run.loaded.data.test.labels[answers.picked], Kind.MEASURED)


def beside_file(run: Run, target: Target, source: Path, answers: Answers) -> OnDevice:
    """The engine's answers beside the arithmetic that its file asks for, on some of the images.

    Args:
        run: whose test images they are.
        target: whose `runner` computes the file's arithmetic here.
        source: the file the engine was built from.
        answers: of the engine.
    """
    chosen = _spread(len(answers.picked), IMAGES)
    test, there = run.loaded.data.test, answers.logits[chosen]
    picked = answers.picked[chosen]
    with target.runner(source) as predict:
        here = predict(to_input(test.read(picked), run.loaded.subject.preprocess).numpy())
    labels = test.labels[picked]
    return OnDevice(
        device=answers.board,
        kind=Kind.MEASURED,
        runtime=answers.at.version,
        samples=len(picked),
        agreement=float((predictions(there) == predictions(here)).mean()),
        top1=top1(there, labels),
        here_top1=top1(here, labels),
        largest_difference=float(np.abs(there - here).max() / max(float(np.ptp(here)), 1e-12)),
    )


def golden_images(run: Run, answers: Answers, folder: Path) -> FileRef:
    """Some of the images with what the engine answered, in a file of the artifact's folder."""
    test, prep = run.loaded.data.test, run.loaded.subject.preprocess
    chosen = _spread(len(answers.picked), golden.IMAGES)
    picked = answers.picked[chosen]
    found = golden.Golden(test.read(picked), test.labels[picked], answers.logits[chosen], prep.mean, prep.std, answers.at)
    file = folder / "golden.safetensors"
    atomic_write(file, golden.to_bytes(found))
    return file_ref(file, run.folder.path)


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Positions spread evenly over so many."""
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))
