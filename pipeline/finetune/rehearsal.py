"""The learning rate of fine-tuning, by short trainings that are thrown away: the highest that does no harm.

A pruned network whose layers were re-fit is near the dense one. How large a step it bears depends on its normalisation, its
weights and how much data there is: at 1e-3 ResNets gain and a network without BatchNorm can lose more than pruning cost it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..task.samples import Data, head
from ..task.task import Task, judged, torch_predictor
from .training import FinetuneSettings, finetune

SHARE = 0.05  # of all steps, that one rehearsal takes
FEWEST, MOST = 40, 200  # steps of one
SAMPLES = 1000  # of the search split
FALLS = (1.0, 1 / 3, 1 / 10, 1 / 30)  # of the learning rate that is tried first
SLACK = 0.01  # share of the untrained network's value that may be lost


@dataclass(frozen=True)
class Rehearsal:
    """The learning rate that was chosen, and what each one tried led to."""

    rate: float
    before: float | None  # the metric on the search split without training; None: nothing was tried
    tried: tuple[tuple[float, float], ...]  # learning rate, the metric after a rehearsal


def steps_of(data: Data, settings: FinetuneSettings) -> int:
    """Steps of one rehearsal; 0 where the training is too short for it."""
    whole = settings.epochs * -(-len(data.train) // settings.batch)
    steps = min(max(round(SHARE * whole), FEWEST), MOST)
    return 0 if whole < 3 * steps else steps


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
    """The highest learning rate, from that of `settings` down to a thirtieth, after which a short training lost nothing.

    Each rehearsal is a whole training of a twentieth of the steps, learning-rate cosine included, on a copy. Where every rate
    loses more than one per cent of the metric, the one that lost least is taken. A training that is too short for it keeps its
    rate. `student` is not changed.

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
    count = min(steps * settings.batch, len(data.train))
    rng = np.random.default_rng(settings.seed)
    few = replace(data, train=data.train.picked(rng.permutation(len(data.train))[:count]), search=head(data.search, SAMPLES))
    short = replace(settings, epochs=-(-steps * settings.batch // count))
    guide, sign = teacher if task.compares else None, 1.0 if task.metric.higher_is_better else -1.0
    before = judged(task, few.search, torch_predictor(student, settings.device), guide, settings.device).value()
    tried: list[tuple[float, float]] = []
    for fall in FALLS:
        rate, own = settings.learning_rate * fall, copy.deepcopy(student)
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            how = replace(short, learning_rate=rate)
            history = finetune(own, teacher, few, task, how, folder=Path(folder), masks=masks, note=lambda _: None)
        tried.append((rate, history[-1].search_value))
        tell(f"learning rate {rate:.1e}: {task.metric.shown(before)} before, {task.metric.shown(history[-1].search_value)} after")
        if sign * (history[-1].search_value - before) >= -SLACK * abs(before):
            return Rehearsal(rate, before, tuple(tried))
    return Rehearsal(max(tried, key=lambda pair: sign * pair[1])[0], before, tuple(tried))
