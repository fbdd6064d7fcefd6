"""Seconds of the stages to come, from a few timed steps of the dense network on this machine.

An estimate, to a factor of two: what a stage does is counted in forward passes and training steps of the dense network, and in
measurements on the device. What a device, a converter or another process takes is not known beforehand.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..build.artifact import CALIBRATION_SAMPLES
from ..config import Config
from ..evaluate.evaluation_context import REWARD_SAMPLES
from ..evaluate.reward_samples import STATISTICS_SAMPLES
from ..finetune.learning_rate_search import SAMPLES, steps_of
from ..finetune.training import FinetuneSettings, batch_for
from ..network.calling import call, moved
from ..network.compute import Compute
from ..network.memory import backward_batch_size
from ..network.modes import borrowed
from ..pattern.finalists import SEQUENTIAL_SAMPLES
from ..score.ranking import CURVATURE_IMAGES
from ..search.search import FINALISTS
from ..task.load import Loaded
from ..types import Knob

FEWEST_EVALUATIONS, FEWEST_EPOCHS = 20, 1  # what --max-minutes leaves at least
SCORED = 3_000  # forward passes that scoring is worth: second moments, or gradients of fewer samples
SESSIONS = 16  # of a report: of the artifact, of the control, and beside int8 alone
# Seconds of a measurement: those of an inference that takes no time, what each second of a forward pass adds, and the most.
QUICK, SESSION = (0.15, 300.0, 1.2), (0.5, 1500.0, 6.0)
INT8_RECIPES = 8  # tried on the search split; one takes about half of what the network takes in torch
TRIALS = 3  # of a learning-rate search, about
TIMED = 32  # samples


@dataclass(frozen=True)
class Paces:
    """Seconds, timed on this machine."""

    forward: float  # of one sample in the dense network
    step: float  # of one training step: the dense network as teacher and as student, one batch


def timed(loaded: Loaded, device: str = "cpu") -> Paces:
    """Times a forward pass and a training step of the dense network, the second of two each."""
    fits = backward_batch_size(loaded.module, loaded.example, Compute(device), TIMED)
    count = min(fits, len(loaded.data.train))
    batch = loaded.data.train.batch(np.arange(count))
    inputs, student = moved(batch.inputs, device), copy.deepcopy(loaded.module)
    with borrowed(loaded.module, device), torch.inference_mode():
        loaded.module.eval()
        forward = _second(lambda: call(loaded.module, inputs))
    student = student.to(device).train()

    def step() -> None:
        outputs = call(student, inputs)
        loss: Tensor = torch.stack([o.float().square().mean() for o in outputs if o.is_floating_point()]).sum()
        torch.autograd.backward(loss)

    try:
        trained = _second(step)
    except Exception:  # the user's forward in train mode; where that matters fine-tuning says so
        trained = 3.0 * forward
    share = batch_for(len(loaded.data.train)) / count
    return Paces(forward / count, (trained + forward) * share)


def estimate(paces: Paces, loaded: Loaded, knobs: Sequence[Knob], config: Config, targets: int) -> dict[str, float]:
    """Seconds by stage, all that a run takes from scoring on. Several budgets share the scores, the table and the evaluations."""
    data, forward = loaded.data, paces.forward
    rewarded = min(REWARD_SAMPLES, len(data.search))
    quick, session = (min(start + each * forward, most) for start, each, most in (QUICK, SESSION))
    candidate = (rewarded + 2 * STATISTICS_SAMPLES) * forward + quick
    steps = math.ceil(len(data.train) / batch_for(len(data.train)))
    judged = min(len(data.search), FinetuneSettings(1, 0).search_samples)
    entries = sum(len(knob.kept) - 1 for knob in knobs)
    budgets = len(config.latency_budget)
    short = steps_of(data, FinetuneSettings(config.finetune_epochs, 0, batch=batch_for(len(data.train))))
    trial = short * paces.step + 2 * min(SAMPLES, len(data.search)) * forward
    learning_rate = TRIALS * trial if short and config.learning_rate is None else 0.0
    scored = SCORED * min(1.0, len(data.train) / CURVATURE_IMAGES)
    solved = min(SEQUENTIAL_SAMPLES, len(data.train))
    shared = {"scoring": scored * forward + entries * quick, "search": config.evaluations * candidate}
    each = {
        "reconstruction": FINALISTS * (4 * solved + rewarded) * forward,
        "fine-tuning": config.finetune_epochs * (steps * paces.step + judged * forward),
        "learning rate": learning_rate,
        "build": targets * 2 * (INT8_RECIPES * 0.5 * len(data.search) + CALIBRATION_SAMPLES) * forward,
        "verification": targets * (4 * len(data.test) * forward + SESSIONS * session),
    }
    return shared | {stage: budgets * seconds for stage, seconds in each.items()}


def fitted(config: Config, expected: Callable[[Config], Mapping[str, float]], minutes: float) -> Config:
    """The options with as many evaluations and epochs as fit into some minutes; with the given ones where all fit.

    Both are reduced by the same factor, down to a few: the other stages take what they take.
    """

    def reduced(share: float) -> Config:
        return replace(
            config,
            evaluations=min(config.evaluations, max(FEWEST_EVALUATIONS, int(config.evaluations * share))),
            finetune_epochs=min(config.finetune_epochs, max(FEWEST_EPOCHS, int(config.finetune_epochs * share))),
        )

    def fits(share: float) -> bool:
        return sum(expected(reduced(share)).values()) <= 60.0 * minutes

    if fits(1.0):
        return config
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return reduced(low)


def told(expected: Mapping[str, float]) -> str:
    """An estimate in a line: the whole, and the stages that take most of it."""
    total = sum(expected.values())
    longest = sorted(expected.items(), key=lambda item: -item[1])
    named = [f"{name} {span(seconds)}" for name, seconds in longest if seconds > 0.05 * total]
    return f"about {span(total)} from here: {', '.join(named)} (estimated)"


def span(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _second(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
