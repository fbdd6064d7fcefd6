"""Training of the pruned network: Adam, distillation from the dense one, masks fixed or re-chosen, checkpoints.

Interrupted at any moment and resumed, it ends with the same bits as uninterrupted (same machine, same thread count, one or two
processes; with more, DistributedDataParallel chooses the order of gradient sums again in the first steps of a call).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ..codec import to_json
from ..errors import BuildError
from ..network.calling import Inputs, call, count_of, in_float, moved
from ..network.memory_layout import fastest_layout
from ..network.modes import borrowed
from ..network.weights import digest_of
from ..task.recipe_data import Targets
from ..task.samples import Batch, Data, Samples, head
from ..task.task import Task, judged, torch_predictor
from ..types import Epoch
from .state import CheckpointFile, Masks, TrainingState, thawed
from .world import ALONE, World

_log = logging.getLogger(__name__)
T = TypeVar("T")
Remask = Callable[[int, nn.Module], Masks]

CHECKPOINT = "finetune.safetensors"
EPOCH_STEPS = 60  # with fewer, an epoch of a small set hardly moves the weights
UNNORMED, GENTLE, BOLD = 3e-4, 1e-3, 3e-3  # learning rates, see `learning_rate_for`; the paper's is the gentle one
VERSION = 3  # of what a checkpoint holds and of the arithmetic that made it


@dataclass(frozen=True)
class FinetuneSettings:
    """How the pruned network is trained. The result depends on all of it, on device and autocast by rounding alone."""

    epochs: int
    seed: int
    learning_rate: float = GENTLE  # the highest; falls to 0 along a cosine
    warmup: float = 0.05  # share of all steps in which the learning rate rises from 0
    batch: int = 128  # samples of an optimizer step
    micro_batch: int | None = None  # samples of a forward and backward pass, gradients are accumulated; None: the whole batch
    weight_decay: float = 0.0  # decoupled (Loshchilov and Hutter 2019); 0 is the paper's Adam
    search_samples: int = 5000  # of the search split, at most, to tell epochs apart
    frozen_norms: bool = False  # BatchNorm keeps its running statistics, see `batchnorm.statistics_match_data`
    autocast: bool = False  # bfloat16 in the student's and the teacher's forward pass
    device: str = "cpu"

    def recipe(self) -> dict[str, Any]:
        """All but device and autocast: a training begun on a GPU resumes without one if the micro-batch is the same."""
        whole = ("micro_batch",) if self.micro_batch is None else ()
        return {name: value for name, value in asdict(self).items() if name not in ("device", "autocast", *whole)}


@dataclass(frozen=True)
class Step:
    """One optimizer step, for a progress bar."""

    step: int  # 1..steps, over all epochs
    steps: int
    loss: float


Progress = Callable[[Step | Epoch], None]


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    task: Task,
    settings: FinetuneSettings,
    *,
    folder: Path,
    masks: Masks | None = None,
    remask: Remask | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = _log.warning,
    world: World = ALONE,
    untrained: float | None = None,
) -> tuple[Epoch, ...]:
    """Train `student` in place on the train split; it ends with the weights of the epoch best on the search split.

    The loss is the task's, see `Task.training_loss`; teacher and student see the same augmented samples. Equal epochs: the later
    one wins. Where none is as good as the untrained student, its weights are kept. The student is in eval mode afterwards, on
    its old device. Every epoch ends with a checkpoint in `folder`; a call with the same arguments and initial student resumes
    from it. A checkpoint of anything else is not used.

    Several processes that call it alike end with the same weights: each works on its part of every batch and of the search split,
    gradients and accuracy are means over all images, rank 0 writes the checkpoint.

    Args:
        student: the pruned network.
        teacher: the dense network; None trains on the labels alone.
        data: train is trained on, search decides which epoch is kept.
        task: its loss is lowered, its metric tells epochs apart.
        settings: of the optimizer, the loss and the batches.
        folder: of the checkpoint.
        masks: parameters and Adam's moments stay exactly 0 where theirs is 0.
        remask: called after each epoch but the last with the epoch's number (from 1) and the student; returns all masks (the
            paper's "dynamic"). It must depend on its arguments alone, and remove as much each time: the best epoch's weights
            carry that epoch's mask.
        progress: called with each step and each epoch of this call.
        note: called where a checkpoint exists but was not used, or parameters are frozen.
        world: the processes that train together; `settings.batch` is shared out over them.
        untrained: the student's metric on the search split, where it is known already.

    Returns:
        The epochs, also those of an earlier call that was interrupted.

    Raises:
        BuildError: the loss is not finite any more, or the processes differ in what they train, start from or have made.
        InputError: batches too small to be shared out.
    """
    digest = _digest(student, teacher, data, task, settings, masks, remask is not None, world)
    world.agree("training", digest)
    search = head(data.search, settings.search_samples)
    search = search.picked(np.array(world.share(len(search)), dtype=np.int64))
    guide = teacher if task.compares else None
    sign = 1.0 if task.metric.higher_is_better else -1.0
    networks = [student] if teacher is None else [student, teacher]
    if settings.epochs and (said := thawed(student)):
        note(said)
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(borrowed(network, settings.device))
        layout = stack.enter_context(fastest_layout(networks, data.train.batch(np.arange(2)).inputs, settings.device))
        state = TrainingState(student, masks or {}, settings.weight_decay)
        file = CheckpointFile(folder / CHECKPOINT, digest)
        if unused := file.load(state):
            note(unused)
        world.agree("checkpoint", json.dumps([to_json(state.history), state.best_value]))
        forward = world.parallel(student)

        def value_now() -> float:
            own = judged(task, search, torch_predictor(student, settings.device, layout), guide, settings.device).value()
            return world.mean_of(own, len(search))

        if not state.history and settings.epochs:
            state.keep_if_best(sign * (value_now() if untrained is None else untrained))  # what training has to be as good as
        for epoch in range(len(state.history) + 1, settings.epochs + 1):
            start = time.perf_counter()
            loss = _run_epoch(state, forward, teacher, data.train, task, settings, epoch, layout, progress, world)
            world.average_buffers(student)
            value = value_now()
            state.keep_if_best(sign * value)
            if remask is not None and epoch < settings.epochs:
                student.eval()
                state.set_masks(remask(epoch, student))
            done = Epoch(epoch, loss, value, time.perf_counter() - start)
            state.history = (*state.history, done)
            world.agree("weights or masks", state.tensors())
            if world.rank == 0:
                file.store(state)
            if progress is not None:
                progress(done)
        if state.history and all(sign * epoch.search_value < state.best_value for epoch in state.history):
            note("No epoch of fine-tuning matched the network before it on the search split: the initial weights were kept.")
        state.finish()
    student.eval()
    return state.history


def learning_rate_for(one_shot: float, network: nn.Module) -> float:
    """The highest learning rate for a plan with this one-shot accuracy (share) in the search: an accurate one is trained gently.

    On the search split of CIFAR-10, ResNet-20 at 0.09 of its latency, one-shot accuracy a third, has 85.0 % after three epochs
    at 0.003 and 82.9 at 0.001; ResNet-56 at 0.15, one-shot 88 %, has 82.6 % and 94.5 % after the first of ten and eight.
    Without BatchNorm it is lower: half of MiniLM keeps 51 % of the nearest neighbours, after 80 steps 45 % at 0.003, 54 % at
    0.001, 56 % at 0.0003 and 54 % at 0.0001.
    """
    if not any(isinstance(layer, _BatchNorm) for layer in network.modules()):
        return UNNORMED
    return BOLD if one_shot < 0.5 else GENTLE


def batch_for(samples: int) -> int:
    """Samples in a batch: 128, of small sets fewer, so that an epoch has 60 steps if 32 samples a batch are enough for it."""
    return next((batch for batch in (128, 64) if samples >= EPOCH_STEPS * batch), 32)


def learning_rate(step: int, steps: int, settings: FinetuneSettings) -> float:
    """The learning rate of step 0..steps-1: up along a line during the warm-up, then down along half a cosine to 0."""
    rising = max(1, round(settings.warmup * steps))
    if step < rising:
        return settings.learning_rate * (step + 1) / rising
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


def batches(samples: Samples, settings: FinetuneSettings, epoch: int, world: World = ALONE) -> Iterator[tuple[Batch, ...]]:
    """Every sample once, shuffled and augmented by (seed, epoch), in batches of nearly one size, each as its micro-batches.

    Nearly one, so that no BatchNorm layer sees a left-over batch of a few samples. Of each batch this rank's part of the world:
    the parts of all ranks are the batch that one process would see, and so are its micro-batches.
    """
    generator = torch.Generator().manual_seed(_epoch_seed(settings, epoch))
    order = torch.randperm(len(samples), generator=generator).numpy()
    for positions in np.array_split(order, -(-len(order) // settings.batch)):
        whole, part = len(positions), world.share(len(positions), least=2)  # BatchNorm takes a variance over them
        # as many on every rank: gradients are averaged over ranks in each backward pass
        count = 1 if settings.micro_batch is None else -(-whole // (settings.micro_batch * world.size))
        made, drawn = [], generator.get_state()
        for own in np.array_split(np.arange(part.start, part.stop), count):
            generator.set_state(drawn)  # each draws for the whole batch and takes its own
            made.append(samples.training_batch(positions[own], generator, whole=whole, first=int(own[0])))
        yield tuple(made)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is being used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, items, None)
            yield item


def _run_epoch(
    state: TrainingState,
    forward: nn.Module,
    teacher: nn.Module | None,
    train: Samples,
    task: Task,
    settings: FinetuneSettings,
    epoch: int,
    layout: torch.memory_format,
    progress: Progress | None,
    world: World,
) -> float:
    """One pass over the training samples; its mean loss."""
    device, count = torch.device(settings.device), -(-len(train) // settings.batch)
    made = batches(train, settings, epoch, world)
    steps, losses = count * settings.epochs, []
    state.student.train()
    for layer in state.student.modules():
        if settings.frozen_norms and isinstance(layer, _BatchNorm):
            layer.eval()
    with _own_randomness(device, _epoch_seed(settings, epoch, world.rank)):
        # on the CPU a second thread would only take turns with the first
        for step, parts in enumerate(made if device.type == "cpu" else ahead(made), (epoch - 1) * count):
            counts = [count_of(part.inputs) for part in parts]
            # gradients are summed over micro-batches and averaged over ranks, wanted is their mean over samples
            whole = len(train) // count + ((step % count) < len(train) % count) if world.size > 1 else sum(counts)
            value = 0.0
            for part, own in zip(parts, counts, strict=True):
                inputs = moved(part.inputs, str(device), layout)
                loss = _loss(forward, teacher, inputs, _on(part.targets, device), task, settings)
                value += loss.item() * (own / sum(counts))
                loss = loss if (share := own * world.size / whole) == 1.0 else loss * share
                loss.backward()  # type: ignore[no-untyped-call]
            value = world.mean_of(value, sum(counts))
            if not math.isfinite(value):
                where = f"a loss of {value} in step {step + 1} of {steps}"
                raise BuildError("fine-tuning diverged", found=where, do="give a lower --learning-rate")
            state.update(learning_rate(step, steps, settings))
            losses.append(value)
            if progress is not None:
                progress(Step(step + 1, steps, value))
    return math.fsum(losses) / len(losses)


def _on(targets: Any, device: torch.device) -> Any:
    """Targets with their tensors on a device."""
    if isinstance(targets, Targets):
        return replace(targets, collated=pytree.tree_map_only(Tensor, lambda t: t.to(device), targets.collated))
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), targets)


def _loss(
    student: nn.Module, teacher: nn.Module | None, inputs: Inputs, targets: Any, task: Task, settings: FinetuneSettings
) -> Tensor:
    kind, guide = pytree.tree_leaves(inputs)[0].device.type, None
    if teacher is not None:
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=settings.autocast):
            guide = tuple(in_float(output) for output in call(teacher, inputs))
    with torch.autocast(kind, torch.bfloat16, enabled=settings.autocast):
        outputs = call(student, inputs)
    return task.training_loss(tuple(in_float(output) for output in outputs), targets, guide)


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Dropout draws from `seed`, kernels repeat their sums in one order, and the process's random state is left as it was."""
    cuda = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if cuda else 0
    with (
        torch.random.fork_rng(devices=[index] if cuda else []),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _epoch_seed(settings: FinetuneSettings, epoch: int, rank: int = 0) -> int:
    """Of an epoch's order and variation; with another rank's number, of its dropout."""
    entropy = (settings.seed, epoch, rank) if rank else (settings.seed, epoch)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def _digest(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    task: Task,
    settings: FinetuneSettings,
    masks: Masks | None,
    dynamic: bool,
    world: World,
) -> str:
    """SHA-256 of all that the training depends on."""
    record = {
        "version": VERSION,
        "settings": settings.recipe(),
        "student": digest_of(student.state_dict()),
        "teacher": None if teacher is None else digest_of(teacher.state_dict()),
        "data": [data.train.digest, data.search.digest],
        "task": [task.key, to_json(task.metric)],
        "masks": digest_of(masks or {}),
        "dynamic": dynamic,
        **({"processes": world.size} if world.size > 1 else {}),  # BatchNorm's statistics depend on it
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
