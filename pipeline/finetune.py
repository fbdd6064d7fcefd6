"""Training of the pruned network: Adam, distillation from the dense one, masks fixed or re-chosen, checkpoints.

Interrupted at any moment and called again, it ends with the same bits as uninterrupted (same machine, same thread count).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from .accuracy import borrowed, logits, top1
from .errors import BuildError
from .preprocess import augmented
from .store import atomic_write
from .types import Epoch, Preprocess, from_json, to_json

if TYPE_CHECKING:
    from .data import DataSet, Split

Masks = Mapping[str, Tensor]  # parameter name -> 0/1 of the parameter's shape
Remask = Callable[[int, nn.Module], Masks]
Batch = tuple[Tensor, Tensor]  # inputs (n, C, H, W), labels (n,)

CHECKPOINT = "finetune.safetensors"
VERSION = 1  # of what a checkpoint holds and of the arithmetic that made it


@dataclass(frozen=True)
class FinetuneSettings:
    """How the pruned network is trained. The result depends on all of it."""

    epochs: int
    seed: int
    learning_rate: float = 1e-3  # the paper's; falls to 0 along a cosine
    warmup: float = 0.05  # share of all steps in which the learning rate rises from 0
    batch: int = 128
    weight_decay: float = 0.0  # decoupled (Loshchilov and Hutter 2019); 0 is the paper's Adam
    distill_weight: float = 0.9  # share of the teacher in the loss; without a teacher the labels have all of it
    temperature: float = 4.0  # both sets of logits are divided by it for the teacher's part
    search_images: int = 5000  # of the search split, at most, to tell epochs apart
    autocast: bool = False  # bfloat16 in the student's and the teacher's forward pass
    device: str = "cpu"


@dataclass(frozen=True)
class Step:
    """One optimizer step, for a progress bar."""

    step: int  # 1..steps, over all epochs
    steps: int
    loss: float

    @property
    def fraction(self) -> float:
        """Share of the whole work done."""
        return self.step / self.steps


Progress = Callable[[Step | Epoch], None]


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    data: DataSet,
    prep: Preprocess,
    settings: FinetuneSettings,
    *,
    folder: Path,
    masks: Masks | None = None,
    remask: Remask | None = None,
    progress: Progress | None = None,
) -> tuple[Epoch, ...]:
    """Train `student` in place on the train split; it ends with the weights of the epoch best on the search split.

    The loss is `(1 - d) * CE(labels) + d * T^2 * KL(teacher || student)` at temperature T (Hinton et al. 2015, equation 1 and
    section 2); teacher and student see the same augmented images. Equal epochs: the later one wins. The student is in eval
    mode afterwards, on its old device. Every epoch ends with a checkpoint in `folder`; a call with the same arguments, the
    student as it was at the start, goes on from there. A checkpoint of anything else is not used.

    Args:
        student: the pruned network.
        teacher: the dense network; None trains on the labels alone.
        data: train is trained on, search decides which epoch is kept.
        prep: mean, std and augmentation.
        settings: see there.
        folder: exists; the checkpoint goes here.
        masks: parameters stay exactly 0 where theirs is 0. Adam's moments do too.
        remask: called after each epoch but the last with the epoch's number (from 1) and the student, and gives all masks
            anew (the paper's "dynamic"); a weight that comes back starts at 0, without moments. It must depend on its
            arguments alone, and remove as much each time: the best epoch's weights carry that epoch's mask.
        progress: told of each step and each epoch of this call.

    Returns:
        The epochs, also those of an earlier call that was interrupted.

    Raises:
        BuildError: the loss is not finite any more.
    """
    digest = _digest(student, teacher, data, prep, settings, masks, remask is not None)
    search = data.search.head(settings.search_images)
    with ExitStack() as stack:
        stack.enter_context(borrowed(student, settings.device))
        if teacher is not None:
            stack.enter_context(borrowed(teacher, settings.device))
            teacher.eval()
        trainer = _Trainer(student, teacher, prep, settings, masks or {})
        file = _CheckpointFile(folder / CHECKPOINT, digest)
        file.load(trainer)
        for epoch in range(len(trainer.history) + 1, settings.epochs + 1):
            start = time.perf_counter()
            loss = trainer.run_epoch(data.train, epoch, progress)
            accuracy = top1(logits(student, search, prep, device=settings.device), search.labels)
            trainer.keep_if_best(accuracy)
            if remask is not None and epoch < settings.epochs:
                student.eval()
                trainer.set_masks(remask(epoch, student))
            done = Epoch(epoch, loss, accuracy, time.perf_counter() - start)
            trainer.history = (*trainer.history, done)
            file.store(trainer)
            if progress is not None:
                progress(done)
        trainer.finish()
    student.eval()
    return trainer.history


def learning_rate(step: int, steps: int, settings: FinetuneSettings) -> float:
    """The learning rate of step 0..steps-1: up along a line during the warm-up, then down along half a cosine to 0."""
    rising = max(1, round(settings.warmup * steps))
    if step < rising:
        return settings.learning_rate * (step + 1) / rising
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


def distillation_loss(student: Tensor, teacher: Tensor | None, labels: Tensor, settings: FinetuneSettings) -> Tensor:
    """Mean loss of logits (n, classes) against labels (n,) and the teacher's logits (n, classes), if any.

    `T^2` keeps the gradient of the teacher's part at one size whatever the temperature (Hinton et al. 2015, section 2.1).
    """
    hard = F.cross_entropy(student, labels)
    if teacher is None:
        return hard
    weight, temperature = settings.distill_weight, settings.temperature
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return (1.0 - weight) * hard + weight * temperature**2 * soft


def batches(split: Split, prep: Preprocess, settings: FinetuneSettings, epoch: int) -> Iterator[Batch]:
    """Every image of `split` once, shuffled and augmented by (seed, epoch), in batches of nearly one size.

    Nearly one, so that no BatchNorm layer sees a left-over batch of a few images.
    """
    generator = torch.Generator().manual_seed(_epoch_seed(settings, epoch))
    order = torch.randperm(len(split), generator=generator).numpy()
    labels = split.labels
    for positions in np.array_split(order, -(-len(order) // settings.batch)):
        yield augmented(split.read(positions), prep, generator), torch.from_numpy(labels[positions])


def ahead(items: Iterator[Batch]) -> Iterator[Batch]:
    """The same items, each made in a thread while the one before it is being used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, items, None)
            yield item


class _Trainer:
    """Student, optimizer and masks while training lasts, and what is known of the epochs so far."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, prep: Preprocess, settings: FinetuneSettings, masks: Masks
    ) -> None:
        self.student, self.teacher, self.prep, self.settings = student, teacher, prep, settings
        self.parameters = dict(student.named_parameters())
        self.optimizer = self._new_optimizer()
        self.removed: dict[str, Tensor] = {}  # parameter -> bool, True where the mask is 0
        self.history: tuple[Epoch, ...] = ()
        self.best_top1 = -1.0
        self.best: dict[str, Tensor] = {}  # state dict of the best epoch so far
        self.set_masks(masks)

    def run_epoch(self, train: Split, epoch: int, progress: Progress | None) -> float:
        """One pass over the training images; its mean loss."""
        device = torch.device(self.settings.device)
        made = batches(train, self.prep, self.settings, epoch)
        count = -(-len(train) // self.settings.batch)
        steps, losses = count * self.settings.epochs, []
        self.student.train()
        with _own_randomness(device, _epoch_seed(self.settings, epoch)):
            for step, (inputs, labels) in enumerate(made if device.type == "cpu" else ahead(made), (epoch - 1) * count):
                loss = self._step(inputs.to(device), labels.to(device), learning_rate(step, steps, self.settings))
                if not math.isfinite(loss):
                    where = f"a loss of {loss} in step {step + 1} of {steps}"
                    raise BuildError("fine-tuning diverged", found=where, do="lower the learning rate")
                losses.append(loss)
                if progress is not None:
                    progress(Step(step + 1, steps, loss))
        return math.fsum(losses) / len(losses)

    def _step(self, inputs: Tensor, labels: Tensor, rate: float) -> float:
        kind = inputs.device.type
        guide = None
        if self.teacher is not None:
            with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=self.settings.autocast):
                guide = self.teacher(inputs).float()
        with torch.autocast(kind, torch.bfloat16, enabled=self.settings.autocast):
            outputs = self.student(inputs)
        loss = distillation_loss(outputs.float(), guide, labels, self.settings)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for name, removed in self.removed.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(removed, 0.0)  # Adam's moments would move the weight on, later
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._zero_removed()
        return loss.item()

    def set_masks(self, masks: Masks) -> None:
        """Remove what `masks` say and nothing else."""
        for name, mask in masks.items():
            shape = self.parameters[name].shape if name in self.parameters else "no such parameter"
            if mask.shape != shape:
                raise ValueError(f"mask of {name}: shape {tuple(mask.shape)}, the student has {shape}")
        self.removed = {n: (m == 0).to(self.parameters[n].device) for n, m in masks.items()}
        self._zero_removed()
        for name, removed in self.removed.items():
            for key, value in self.optimizer.state.get(self.parameters[name], {}).items():
                if key != "step":
                    value.masked_fill_(removed, 0.0)

    def keep_if_best(self, accuracy: float) -> None:
        """Keep a copy of the student unless an earlier epoch was better."""
        if accuracy >= self.best_top1:
            self.best_top1 = accuracy
            self.best = {k: v.detach().clone() for k, v in self.student.state_dict().items()}

    def finish(self) -> None:
        """Give the student the weights of the best epoch, and drop its gradients."""
        self.optimizer.zero_grad()
        if self.best:
            self.student.load_state_dict(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that training goes on from."""
        found = {f"student/{k}": v for k, v in self.student.state_dict().items()}
        found |= {f"best/{k}": v for k, v in self.best.items()}
        found |= {f"removed/{k}": v for k, v in self.removed.items()}
        for name, parameter in self.parameters.items():
            found |= {f"adam/{name}/{k}": v for k, v in self.optimizer.state.get(parameter, {}).items()}
        return found

    def go_on_from(self, tensors: Mapping[str, Tensor], history: tuple[Epoch, ...], best_top1: float) -> None:
        """The inverse of `tensors`."""
        device = torch.device(self.settings.device)
        parts: dict[str, dict[str, Tensor]] = {"student": {}, "best": {}, "removed": {}, "adam": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.student.load_state_dict(parts["student"])
        self.best = {k: v.to(device) for k, v in parts["best"].items()}
        self.removed = {k: v.to(device) for k, v in parts["removed"].items()}
        self.history, self.best_top1 = history, best_top1
        names = {parameter: name for name, parameter in self.parameters.items()}
        ordered = [names[p] for group in self.optimizer.param_groups for p in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts["adam"].items():
            name, _, field = key.rpartition("/")
            moments.setdefault(ordered.index(name), {})[field] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Adam with decoupled weight decay on weights, not on biases and BatchNorm."""
        decay = self.settings.weight_decay
        groups = [
            {"params": [p for p in self.parameters.values() if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in self.parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, fused=True)

    @torch.no_grad()
    def _zero_removed(self) -> None:
        for name, removed in self.removed.items():
            self.parameters[name].masked_fill_(removed, 0.0)


@dataclass(frozen=True)
class _CheckpointFile:
    """The state of a trainer in one file: tensors, and in the file's header the rest as JSON. Written whole or not at all."""

    path: Path
    digest: str  # of all that the training depends on

    def store(self, trainer: _Trainer) -> None:
        # copies, since safetensors takes no two names for one memory (tied weights)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in trainer.tensors().items()}
        record = {
            "digest": self.digest,
            "tensors": _sha256(tensors),
            "history": to_json(trainer.history),
            "best_top1": trainer.best_top1,
        }
        atomic_write(self.path, save(tensors, {"finetune": json.dumps(record)}))

    def load(self, trainer: _Trainer) -> None:
        """Let `trainer` go on from here, if this is a whole checkpoint of the same training; else it starts anew."""
        if not self.path.is_file():
            return
        try:
            with safe_open(self.path, "pt") as file:
                record = json.loads(file.metadata()["finetune"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
            history, best_top1 = from_json(tuple[Epoch, ...], record["history"]), float(record["best_top1"])
            usable = record["digest"] == self.digest and record["tensors"] == _sha256(tensors)
        except (SafetensorError, ValueError, KeyError, TypeError):
            return  # damaged: the work is done again
        if usable:
            trainer.go_on_from(tensors, history, best_top1)


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


def _epoch_seed(settings: FinetuneSettings, epoch: int) -> int:
    return int(np.random.SeedSequence((settings.seed, epoch)).generate_state(1, np.uint64)[0])


def _digest(
    student: nn.Module,
    teacher: nn.Module | None,
    data: DataSet,
    prep: Preprocess,
    settings: FinetuneSettings,
    masks: Masks | None,
    dynamic: bool,
) -> str:
    """SHA-256 of all that the training depends on."""
    record = {
        "version": VERSION,
        "settings": asdict(settings),
        "student": _sha256(student.state_dict()),
        "teacher": None if teacher is None else _sha256(teacher.state_dict()),
        "data": [data.info.sha256, len(data.train), len(data.search)],
        "order": [hashlib.sha256(split.indices.tobytes()).hexdigest() for split in (data.train, data.search)],
        "preprocess": to_json(prep),
        "masks": _sha256(masks or {}),
        "dynamic": dynamic,
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
