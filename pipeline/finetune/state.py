"""Training state (student, masks, Adam's moments, epochs so far), in memory and in a checkpoint file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..codec import from_json, to_json
from ..files import atomic_write
from ..network.weights import digest_of
from ..types import Epoch

Masks = Mapping[str, Tensor]  # parameter name -> 0/1 of the parameter's shape


class TrainingState:
    """A student in training, on its device.

    Args:
        student: trained in place.
        masks: see `set_masks`.
        weight_decay: decoupled, on weights; not on biases and BatchNorm.

    Raises:
        ValueError: a mask fits no parameter.
    """

    def __init__(self, student: nn.Module, masks: Masks, weight_decay: float) -> None:
        self.student = student
        self.parameters = dict(student.named_parameters())
        groups = [
            {"params": [p for p in self.parameters.values() if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.optimizer.zero_grad()  # the network may bring gradients of its own
        self.removed: dict[str, Tensor] = {}  # parameter -> bool, True where the mask is 0
        self.history: tuple[Epoch, ...] = ()
        self.best_value = -math.inf
        self.best: dict[str, Tensor] = {}  # state dict of the best epoch so far
        self.set_masks(masks)

    def update(self, rate: float) -> None:
        """One step of Adam down the gradient that was accumulated; removed weights and their moments stay exactly 0."""
        for name, removed in self.removed.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(removed, 0.0)  # the moments would move a weight that returns
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._zero_removed()

    def set_masks(self, masks: Masks) -> None:
        """Replaces the masks. A weight that returns starts at 0, without moments."""
        for name, mask in masks.items():
            shape = self.parameters[name].shape if name in self.parameters else None
            if mask.shape != shape:
                has = "no such parameter" if shape is None else tuple(shape)
                raise ValueError(f"mask of {name}: shape {tuple(mask.shape)}, the student has {has}")
        self.removed = {n: (m == 0).to(self.parameters[n].device) for n, m in masks.items()}
        self._zero_removed()
        for name, removed in self.removed.items():
            for key, value in self.optimizer.state.get(self.parameters[name], {}).items():
                if key != "step":
                    value.masked_fill_(removed, 0.0)

    def keep_if_best(self, accuracy: float) -> None:
        """Keep a copy of the student unless an earlier epoch was better."""
        if accuracy >= self.best_value:
            self.best_value = accuracy
            self.best = {k: v.detach().clone() for k, v in self.student.state_dict().items()}

    def finish(self) -> None:
        """Give the student the weights of the best epoch, if there is one, and drop its gradients."""
        self.optimizer.zero_grad()
        if self.best:
            self.student.load_state_dict(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by name."""
        found = {f"student/{k}": v for k, v in self.student.state_dict().items()}
        found |= {f"best/{k}": v for k, v in self.best.items()}
        found |= {f"removed/{k}": v for k, v in self.removed.items()}
        for name, parameter in self.parameters.items():
            found |= {f"adam/{name}/{k}": v for k, v in self.optimizer.state.get(parameter, {}).items()}
        return found

    @torch.no_grad()
    def go_on_from(self, tensors: Mapping[str, Tensor], history: tuple[Epoch, ...], best_value: float) -> None:
        """The inverse of `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"student": {}, "best": {}, "removed": {}, "adam": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.student.load_state_dict(parts["student"])
        self.best = parts["best"]
        self.removed = {k: v.to(self.parameters[k].device) for k, v in parts["removed"].items()}
        self.history, self.best_value = history, best_value
        for key, tensor in parts["adam"].items():
            name, _, field = key.rpartition("/")
            parameter = self.parameters[name]
            # in the weight's memory format: the fused kernel walks both in memory order
            laid_out = tensor.to(parameter.device) if tensor.dim() == 0 else torch.empty_like(parameter).copy_(tensor)
            self.optimizer.state[parameter][field] = laid_out

    @torch.no_grad()
    def _zero_removed(self) -> None:
        for name, removed in self.removed.items():
            self.parameters[name].masked_fill_(removed, 0.0)


def thawed(student: nn.Module) -> str:
    """Unfreezes a network that is frozen as a whole: it is often so for inference alone. Returns what to note, or "".

    One that is frozen in part is left so: that is meant.
    """
    parameters = [p for p in student.parameters() if p.is_floating_point()]
    frozen = sum(not p.requires_grad for p in parameters)
    if not frozen:
        return ""
    if frozen < len(parameters):
        return f"{frozen} of the network's {len(parameters)} parameters are frozen (requires_grad) and were not fine-tuned."
    for parameter in parameters:
        parameter.requires_grad_(True)
    return "The network came with all its parameters frozen (requires_grad); fine-tuning trained all of them."


@dataclass(frozen=True)
class CheckpointFile:
    """A training state in one file: tensors, and in the file's header the rest as JSON. Written whole or not at all."""

    path: Path
    digest: str  # of all that the training depends on

    def store(self, state: TrainingState) -> None:
        """Write the state.

        Raises:
            UnavailableError: the disk is full.
        """
        # copies, since safetensors takes no two names for one memory (tied weights)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.tensors().items()}
        record = {
            "digest": self.digest,
            "tensors": digest_of(tensors),
            "history": to_json(state.history),
            "best_value": state.best_value,
        }
        atomic_write(self.path, save(tensors, {"training": json.dumps(record)}))

    def load(self, state: TrainingState) -> str:
        """Restores `state` from this file. Returns why it starts from its first epoch although there is a file, else "".

        A file of another training (digest) or with changed tensors leaves `state` as it is.
        """
        if not self.path.is_file():
            return ""
        try:
            with safe_open(self.path, "pt") as file:
                record = json.loads(file.metadata()["training"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
            history, best_value = from_json(tuple[Epoch, ...], record["history"]), float(record["best_value"])
            if record["tensors"] != digest_of(tensors):
                raise ValueError("its digest does not match")
            own = record["digest"] == self.digest
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            return f"the checkpoint {self.path.name} is damaged ({error}); training started again from its first epoch"
        if not own:
            return f"the checkpoint {self.path.name} is of another training; this one started from its first epoch"
        state.go_on_from(tensors, history, best_value)
        return ""
