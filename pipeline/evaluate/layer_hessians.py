"""Hessians of the dense network's layers, within a bound on memory: held, or computed in parts and kept in files."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..network.calling import Inputs, elements_of
from ..network.compute import Compute
from ..network.memory import inference_batch_size
from ..network.modes import borrowed
from ..reconstruct.memory import SOLVING_BYTES
from ..score.curvature import local_hessian
from ..task.samples import BATCH, batches

HESSIAN_IMAGES = 500  # at 8x8 positions each that is 50 columns for every row of a 576 x 576 matrix
TAKING_BYTES = 12  # for each entry while a Hessian is summed: float64, and a float32 product


class LayerHessians(Mapping[str, Tensor]):
    """The layer-local Hessian X X^T of every convolution without groups and every linear layer, on the CPU.

    They are computed when the first one is asked for. If all of them together exceed the memory, they are computed in several
    passes over the images and written to `folder`; one at a time is then held. A layer whose own Hessian is too large to be
    solved with is left out.

    Args:
        net: dense network, eval mode.
        inputs: training images (n, C, H, W), augmented.
        compute: its device and memory are used.
        folder: for the files; made when it is needed, and may be deleted afterwards.
    """

    def __init__(self, net: nn.Module, inputs: Inputs, compute: Compute, folder: Path) -> None:
        self._net, self._inputs, self._compute, self._folder = net, inputs, compute, folder
        layers = {
            name: layer.weight[0].numel()
            for name, layer in net.named_modules()
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        }
        self.left_out = tuple(name for name, k in layers.items() if SOLVING_BYTES * k * k > compute.memory_bytes)
        self._parts: list[list[str]] = [[]]
        taken = 0
        for name, k in layers.items():
            if name in self.left_out:
                continue
            if self._parts[-1] and taken + TAKING_BYTES * k * k > compute.memory_bytes:
                self._parts.append([])
                taken = 0
            self._parts[-1].append(name)
            taken += TAKING_BYTES * k * k
        self._names = [name for part in self._parts for name in part]
        self._held: dict[str, Tensor] = {}
        self._written: set[str] = set()

    def remarks(self) -> Iterator[str]:
        """What the memory did not allow, for the report."""
        bound = f"{self._compute.memory_bytes / 2**30:.1f} GiB of memory"
        if self.left_out:
            yield (
                f"The Hessians of {len(self.left_out)} layers ({', '.join(self.left_out[:3])}) do not fit in {bound}: candidates"
                " keep the dense weights there."
            )
        if len(self._parts) > 1:
            yield f"Layer Hessians do not fit in {bound} together: computed in {len(self._parts)} parts and kept on disk."

    def close(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        part = next((part for part in self._parts if name in part), None)
        if part is None:
            raise KeyError(name)
        if name not in self._written:
            self._held = {}
            with borrowed(self._net, self._compute.device):
                size = inference_batch_size(elements_of(self._inputs), BATCH)
                found = local_hessian(self._net, batches(self._inputs[:HESSIAN_IMAGES], size), part)
            found = {layer: hessian.cpu() for layer, hessian in found.items()}
            if len(self._parts) == 1:
                self._held = found
                return found[name]
            self._folder.mkdir(parents=True, exist_ok=True)
            for layer, hessian in found.items():
                save_file({"hessian": hessian.contiguous()}, self._file(layer))
            self._written |= found.keys()
            del found
        self._held = {name: load_file(self._file(name))["hessian"]}
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
