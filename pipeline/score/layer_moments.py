"""What the layers of a captured network read: second moments of their inputs, the local curvature of their output errors."""

from __future__ import annotations

from typing import Any

import torch

from ..axes.coupling import Coupling
from ..axes.program import Layer, Program, part_of, samples
from ..network.compute import CPU, Compute
from ..network.exact_mode import exact_arithmetic

CHUNK = 50  # samples whose columns are formed at a time
BYTES_PER_ENTRY = 40  # of a layer's second moments, while they are summed and solved with


class LayerMoments:
    """Second moments of the inputs, and energy of the outputs, of every convolution without groups and every linear layer.

    On large feature maps the moments are those of sampled rows, see `network.row_sampling`.

    Args:
        coupling: of the dense network.
        inputs: network inputs, the samples along axis 0; whole chunks of them are used.
        valid: (n, tokens), False for padding, which then does not count in layers on tokens.
        compute: a layer whose moments do not fit its memory is left out, see `left_out`.
    """

    def __init__(self, coupling: Coupling, inputs: Any, compute: Compute = CPU, valid: torch.Tensor | None = None) -> None:
        self.module = coupling.walk.captured.module
        self.gram: dict[
            str, torch.Tensor
        ] = {}  # weight -> (k + 1, k + 1) float64; the last input is a constant 1, 0 without a bias
        self.energy: dict[str, torch.Tensor] = {}  # weight -> (outputs,) sums of squares
        self.bias: dict[str, str | None] = {}  # weight -> bias
        self.left_out: dict[str, None] = {}
        self._bytes = compute.memory_bytes
        size = min(CHUNK, samples(inputs))
        program = Program.of(self.module, part_of(inputs, 0, size))
        with exact_arithmetic("cpu"), torch.no_grad():
            for start in range(0, samples(inputs) - size + 1, size):
                own = None if valid is None else valid[start : start + size]
                self._pass(program.fed(part_of(inputs, start, start + size)), own, start // size)

    def _pass(self, program: Program, valid: torch.Tensor | None, turn: int) -> None:
        layers = {layer.node: layer for layer in program.layers()}
        for k, node in enumerate(program.nodes):
            if node.op == "output":
                break
            program.value(node)
            if node in layers:
                self._add(layers[node], program, valid, turn)
            program.drop(k)

    def _add(self, layer: Layer, program: Program, valid: torch.Tensor | None, turn: int) -> None:
        name, weight = layer.weight, program.tensor(layer.weight)
        self.bias[name] = layer.bias
        squares = counted(layer.outputs(program.env[layer.node]), valid).double().square().sum(1)
        self.energy[name] = self.energy[name] + squares if name in self.energy else squares
        if BYTES_PER_ENTRY * weight[0].numel() ** 2 > self._bytes:
            self.left_out[name] = None
            return
        rows = layer.rows(program.env[layer.node], turn)
        x = counted(layer.columns_of(program.env[layer.data], rows), valid)
        x = torch.cat([x, x.new_full((1, x.shape[1]), 0.0 if layer.bias is None else 1.0)])
        found = (x @ x.T).double()
        self.gram[name] = self.gram[name] + found if name in self.gram else found


def counted(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Values (n, channels, positions) as (channels, n * positions), without padding where the positions are tokens."""
    flat = values.permute(1, 0, 2).flatten(1)
    if valid is None or values.shape[::2] != valid.shape:
        return flat
    return flat[:, valid.flatten().to(flat.device)]
