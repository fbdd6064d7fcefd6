"""Layer sizes of a dense network, and from them the multiply-accumulates of its candidates, whatever the file format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from .base import Structure


@dataclass(frozen=True)
class Layer:
    """Size of a convolution or linear layer, batch 1."""

    inputs: int
    outputs: int
    kernel: int  # kernel positions: 9 for 3x3, 1 for a linear layer
    groups: int
    positions: int  # output positions: height x width, 1 for a linear layer on a vector

    def weights(self, inputs: int, outputs: int) -> int:
        """Number of weights with that many channels kept."""
        depthwise = self.groups > 1 and self.groups == self.inputs
        return self.kernel * outputs * (1 if depthwise else inputs // self.groups)


class LayerSizes:
    """The layers of a dense network and what a structure leaves of them.

    `sizes` returns the layers by module name, and is called when they are first needed; `remaining` returns the names of those
    left when residual branches, each given by its last layer, are removed.
    """

    def __init__(self, sizes: Callable[[], Mapping[str, Layer]], remaining: Callable[[tuple[str, ...]], Iterable[str]]) -> None:
        self._layers, self._remaining = functools.cache(sizes), functools.cache(remaining)

    def kept(self, structure: Structure) -> Iterator[tuple[str, Layer, int, int]]:
        """Yields (name, dense size, inputs kept, outputs kept) of every layer left, by name."""
        for name in sorted(self._remaining(tuple(sorted(structure.removed)))):
            layer = self._layers()[name]
            yield name, layer, *structure.widths.get(name, (layer.inputs, layer.outputs))

    def macs(self, structure: Structure) -> int:
        """Multiply-accumulates of a structure's convolutions and linear layers, batch 1."""
        return sum(layer.positions * layer.weights(ins, outs) for _, layer, ins, outs in self.kept(structure))
