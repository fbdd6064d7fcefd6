"""Visualisations of some test samples by the recipe: the dense network's outputs beside the artifact's."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...targets.base import Target
from ..errors import InputError
from ..files import atomic_write, file_ref
from ..run_context import RunContext
from ..run_folder import Stage
from ..task.task import artifact_predictor, torch_predictor
from ..types import Artifact, FileRef
from .statistics import evenly_spaced

SAMPLES = 2
Pairs = tuple[tuple[FileRef, FileRef], ...]


@dataclass(frozen=True)
class Pictures:
    """Files by pairs: the dense network's and the artifact's."""

    pairs: Pairs


def pictures_of(run: RunContext, before: Stage, target: Target, artifact: Artifact) -> Pairs:
    """PNG files beside the artifact, in pairs; none where the task has no visualisation, or where it fails, which a note says."""
    stage = run.folder.stage(f"pictures-{target.name}", "2", {}, (before.key, artifact.file.sha256))
    try:
        return stage.once(Pictures, lambda: Pictures(_drawn(run, target, artifact))).pairs
    except InputError as error:
        run.notes.append(f"{target.name}: no pictures of test samples: {error}")
        return ()


def _drawn(run: RunContext, target: Target, artifact: Artifact) -> Pairs:
    task, test = run.loaded.task, run.loaded.data.test
    dense, path = torch_predictor(run.loaded.module, run.compute.device), run.folder.path / artifact.file.path
    found: list[tuple[FileRef, FileRef]] = []
    with target.runner(path) as answer:
        predict = artifact_predictor(target, answer)
        for number, at in enumerate(evenly_spaced(len(test), SAMPLES)):
            batch = test.batch(np.array([at]))
            seen = task.picture(batch, dense(batch))
            if seen is None:
                return ()
            after = task.picture(batch, predict(batch))
            assert after is not None  # it drew the other one
            refs = []
            for name, image in (("dense", seen), ("artifact", after)):
                file = path.with_name(f"sample-{number}-{name}.png")
                atomic_write(file, _png(image))
                refs.append(file_ref(file, run.folder.path))
            found.append((refs[0], refs[1]))
    return tuple(found)


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
