"""What the layers of a captured network read: second moments of their inputs, the local curvature of their output errors."""

from __future__ import annotations

import hashlib
import math
import shutil
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..axes.program import Layer, Program, part_of, samples
from ..files import disk_errors
from ..network.compute import CPU, Compute
from ..network.exact_mode import exact_arithmetic
from ..network.modes import borrowed

CHUNK = 50  # samples whose columns are formed at a time
BYTES_PER_ENTRY = 40  # of a layer's second moments, while they are solved with
TAKING_BYTES = 12  # while they are summed: float64, and a float32 product


class LayerMoments:
    """Second moments of the inputs, and energy of the outputs, of every convolution without groups and every linear layer.

    On large feature maps the moments are those of sampled rows, see `network.row_sampling`. `gram` maps a weight to
    (k + 1, k + 1) float64 on the CPU; the last input is a constant 1, 0 without a bias.

    Args:
        module: the dense network with plain weights, eval mode.
        inputs: network inputs, the samples along axis 0; whole chunks of them are used.
        compute: where they are computed, within its memory; a layer whose moments are too large to be solved with is left out,
            see `left_out`.
        valid: (n, tokens), False for padding, which then does not count in layers on tokens.
        most_inputs: layers with more inputs, kernel included, are left out too.
        folder: for files where the moments of all layers do not fit in the memory together; deleted with this object.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        compute: Compute = CPU,
        valid: torch.Tensor | None = None,
        folder: Path | None = None,
        *,
        most_inputs: int | None = None,
    ) -> None:
        self.module, self._inputs, self._compute, self._valid = module, inputs, compute, valid
        self._energy: dict[str, torch.Tensor] = {}
        self._size = min(CHUNK, samples(inputs))
        self._program = Program.of(module, part_of(inputs, 0, self._size))
        layers = list(self._program.layers())
        self.bias: dict[str, str | None] = {layer.weight: layer.bias for layer in layers}  # weight -> bias
        sizes = {layer.weight: self._program.tensor(layer.weight)[0].numel() for layer in layers}
        bound = compute.memory_bytes
        most = math.isqrt(bound // BYTES_PER_ENTRY)
        most = most if most_inputs is None else min(most, most_inputs)
        self.left_out = tuple(name for name, k in sizes.items() if k > most)
        bytes_ = {name: TAKING_BYTES * k**2 for name, k in sizes.items() if name not in self.left_out}
        self.gram = _Parts(bytes_, self._taken, bound, folder)

    @property
    def memory_bytes(self) -> int:
        """The memory that they may take; caches beside them are bounded by a share of it."""
        return self._compute.memory_bytes

    @property
    def energy(self) -> Mapping[str, torch.Tensor]:
        """Weight -> (outputs,) sums of squares of the layer's outputs."""
        if not self._energy:
            self._taken(())
        return self._energy

    def remarks(self) -> Iterator[str]:
        """What the memory did not allow, for the report."""
        bound = f"{self._compute.memory_bytes / 2**30:.1f} GiB of memory"
        if self.left_out:
            yield (
                f"The Hessians of {len(self.left_out)} layers ({', '.join(self.left_out[:3])}) do not fit in {bound}: candidates"
                " keep the dense weights there."
            )
        if len(self.gram.parts) > 1:
            yield f"Layer Hessians do not fit in {bound} together: computed in {len(self.gram.parts)} parts and kept on disk."

    def _taken(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Moments of some layers; energies of all of them the first time."""
        device, size = self._compute.device, self._size
        found: dict[str, torch.Tensor] = {}
        energy: dict[str, torch.Tensor] = {}
        with borrowed(self.module, device), exact_arithmetic(device), torch.no_grad():
            self.module.eval()
            for start in range(0, samples(self._inputs) - size + 1, size):
                own = None if self._valid is None else self._valid[start : start + size]
                program = self._program.fed(part_of(self._inputs, start, start + size), device)
                layers = {layer.node: layer for layer in program.layers()}
                for k, node in enumerate(program.nodes):
                    if node.op == "output":
                        break
                    program.value(node)
                    if node in layers:
                        layer = layers[node]
                        squares = counted(layer.outputs(program.env[node]), own).double().square().sum(1)
                        energy[layer.weight] = energy.get(layer.weight, 0.0) + squares
                        if layer.weight in names:
                            found[layer.weight] = found.get(layer.weight, 0.0) + _moments(layer, program, own, start // size)
                    program.drop(k)
        self._energy = self._energy or {name: value.cpu() for name, value in energy.items()}
        return {name: value.cpu() for name, value in found.items()}


def _moments(layer: Layer, program: Program, valid: torch.Tensor | None, turn: int) -> torch.Tensor:
    rows = layer.rows(program.env[layer.node], turn)
    x = counted(layer.columns_of(program.env[layer.data], rows), valid)
    x = torch.cat([x, x.new_full((1, x.shape[1]), 0.0 if layer.bias is None else 1.0)])
    return (x @ x.T).double()


def counted(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Values (n, channels, positions) as (channels, n * positions), without padding where the positions are tokens."""
    flat = values.permute(1, 0, 2).flatten(1)
    if valid is None or values.shape[::2] != valid.shape:
        return flat
    return flat[:, valid.flatten().to(flat.device)]


class _Parts(Mapping[str, torch.Tensor]):
    """Large tensors within a bound on memory: held, or computed in parts, kept in files and held one at a time."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        taken: Callable[[Collection[str]], dict[str, torch.Tensor]],
        bound: int,
        folder: Path | None,
    ) -> None:
        self._taken, self._folder = taken, folder
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.parts: list[list[str]] = [[]]
        held = 0
        for name, size in sizes.items():
            if self.parts[-1] and held + size > bound:
                self.parts.append([])
                held = 0
            self.parts[-1].append(name)
            held += size
        self._names = list(sizes)
        self._held: dict[str, torch.Tensor] = {}
        self._written: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._held:
            return self._held[name]
        part = next((part for part in self.parts if name in part), None)
        if part is None:
            raise KeyError(name)
        if name not in self._written:
            self._held = {}
            found = self._taken(part)
            if len(self.parts) == 1 or self._folder is None:
                self._held = found
                return found[name]
            with disk_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                for layer, tensor in found.items():
                    save_file({"moments": tensor.contiguous()}, self._file(layer))
            self._written |= found.keys()
            del found
        self._held = {name: load_file(self._file(name))["moments"]}
        return self._held[name]

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _file(self, name: str) -> Path:
        assert self._folder is not None  # __getitem__
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
