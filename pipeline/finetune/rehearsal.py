"""The learning rate of fine-tuning, by short trainings that are thrown away: the highest that ends as well as any.

A pruned network whose layers were re-fit is near the dense one. How large a step it bears depends on its normalisation, its
weights and how much data there is: at 1e-3 ResNets gain and a network without BatchNorm can lose more than pruning cost it.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..errors import BuildError
from ..task.samples import Data, head
from ..task.task import Task, judged, torch_predictor
from .training import FinetuneSettings, finetune

SHARE = 0.05  # of all steps, that one rehearsal takes
FEWEST, MOST = 40, 200  # steps of one
ROOM = 20  # a training of fewer times its steps is not rehearsed: several rehearsals would take as long
SAMPLES = 1000  # of the search split
RATES = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
SLACK = 0.005  # share of the best value within which a higher rate is preferred: a short training flatters low ones


@dataclass(frozen=True)
class Rehearsal:
    """The learning rate that was chosen, and what each one tried led to."""

    rate: float
    before: float | None  # the metric on the search split without training; None: nothing was tried
    tried: tuple[tuple[float, float], ...]  # learning rate, the metric after a rehearsal that did not diverge


def steps_of(data: Data, settings: FinetuneSettings) -> int:
    """Steps of one rehearsal; 0 where the training is too short for it."""
    whole = settings.epochs * -(-len(data.train) // settings.batch)
    steps = min(max(round(SHARE * whole), FEWEST), MOST)
    return 0 if whole < ROOM * steps else steps


def rehearsed(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    task: Task,
    settings: FinetuneSettings,
    *,
    masks: dict[str, Tensor] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Rehearsal:
    """The highest of `RATES` after which a short training ended as well, within half a per cent, as after any that was tried.

    Each rehearsal is a whole training, learning-rate cosine included, on a copy: a twentieth of the steps, but 40 to 200. Rates
    are tried from the highest down, until one ends no better than the best so far, which itself has to be as good as the network
    without training. Where every rehearsal diverges the lowest rate is taken. A training that is too short keeps its rate.
    `student` is not changed.

    Args:
        student: the pruned network, eval mode.
        teacher: see `training.finetune`.
        task: see there.
        data: trained on a part of train, judged on a part of search.
        settings: of the training that follows.
        masks: parameter -> 0 where a weight has to stay zero.
        tell: called with a line for each rate.
    """
    steps = steps_of(data, settings)
    if steps == 0:
        return Rehearsal(settings.learning_rate, None, ())
    epochs = -(-steps * settings.batch // len(data.train))
    count = min(steps * settings.batch // epochs, len(data.train))
    rng = np.random.default_rng(settings.seed)
    few = replace(data, train=data.train.picked(rng.permutation(len(data.train))[:count]), search=head(data.search, SAMPLES))
    short = replace(settings, epochs=epochs)
    guide, sign = teacher if task.compares else None, 1.0 if task.metric.higher_is_better else -1.0
    before = judged(task, few.search, torch_predictor(student, settings.device), guide, settings.device).value()
    tried: list[tuple[float, float]] = []
    for rate in RATES:
        own = copy.deepcopy(student)
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            how = replace(short, learning_rate=rate)
            try:
                history = finetune(own, teacher, few, task, how, folder=Path(folder), masks=masks, note=lambda _: None)
                value = history[-1].search_value
            except BuildError:
                value = math.nan
        after = f"{task.metric.shown(value)} after" if math.isfinite(value) else "diverged"
        tell(f"learning rate {rate:.0e}: {task.metric.shown(before)} before, {after}")
        if not math.isfinite(value):
            continue
        best = max((sign * last for _, last in tried), default=-math.inf)
        tried.append((rate, value))
        if sign * value <= best and best >= sign * before - SLACK * abs(before):
            break
    best = max((sign * value for _, value in tried), default=0.0)
    good = [rate for rate, value in tried if sign * value >= best - SLACK * abs(best)]
    return Rehearsal(max(good, default=RATES[-1]), before, tuple(tried))
