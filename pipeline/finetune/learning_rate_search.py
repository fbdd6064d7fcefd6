"""Searches the learning rate of fine-tuning by short trial runs: the highest whose validation metric is as good as any.

After layer-wise reconstruction a pruned network is near the dense one. The learning rate it tolerates depends on its
normalisation, its weights and the size of the training set: at 1e-3 ResNets gain, and a network without BatchNorm can lose more
than pruning cost it.
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

SHARE = 0.05  # of all steps, that one trial takes
FEWEST, MOST = 40, 200  # steps of one
ROOM = 20  # fine-tuning of fewer times the shortest trial's steps has no search: several trials would take as long
SAMPLES = 1000  # of the search split
RATES = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
SLACK = 0.005  # share of the best value within which a higher rate is preferred: a short trial favours low ones


@dataclass(frozen=True)
class LearningRate:
    """The learning rate that was chosen, and the metric on the search split after each trial."""

    rate: float
    before: float  # the metric before fine-tuning
    tried: tuple[tuple[float, float], ...]  # learning rate and metric of trials that did not diverge


def steps_of(data: Data, settings: FinetuneSettings) -> int:
    """Steps of one trial; 0 where fine-tuning is too short for a search."""
    whole = settings.epochs * -(-len(data.train) // settings.batch)
    steps = min(max(round(SHARE * whole), FEWEST), MOST)
    return 0 if whole < ROOM * FEWEST else steps


def search_learning_rate(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    task: Task,
    settings: FinetuneSettings,
    *,
    masks: dict[str, Tensor] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> LearningRate:
    """Returns the highest of `RATES` whose metric is within 0.5 % of the best trial's.

    Each trial trains a copy for 5 % of the steps (40 to 200) with the full schedule, warm-up and cosine decay. Rates are tried
    from the highest down, until one does not improve on the best so far and the best at least matches the network before
    fine-tuning.
    Where every trial diverges the lowest rate is taken. `student` is not changed.

    Args:
        student: the pruned network, eval mode.
        teacher: see `training.finetune`.
        task: see there.
        data: trained on a part of train, judged on a part of search.
        settings: of the fine-tuning that follows; long enough for a search (`steps_of`).
        masks: parameter -> 0 where a weight has to stay zero.
        tell: called with a line for each rate.
    """
    steps = steps_of(data, settings)
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
                history = finetune(
                    own, teacher, few, task, how, folder=Path(folder), masks=masks, note=lambda _: None, untrained=before
                )
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
    return LearningRate(max(good, default=RATES[-1]), before, tuple(tried))
