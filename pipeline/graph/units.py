"""What is removed together: the one vocabulary of coupling, scoring, plans and surgery."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """Positions along one axis of one parameter or buffer."""

    parameter: str  # its name in the network, e.g. "layer1.0.conv1.weight"
    axis: int  # of a weight: 0 its outputs, 1 its inputs
    indices: tuple[int, ...]

    @property
    def layer(self) -> str:
        """Name of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Unit:
    """One unit of a group, such as a channel: every slice that is removed with it."""

    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Block:
    """A residual branch that can be removed as a whole, so that its shortcut alone is left."""

    name: str  # "block:" and its last layer
    layers: tuple[str, ...]  # in the order they run
    groups: tuple[str, ...]  # the channel groups that lie inside: nothing outside the branch holds a slice of them
    tail: str  # the last layer
    addition: str  # name of the graph's node that adds branch and shortcut
    branch: str  # name of the operand of the addition that is removed


@dataclass(frozen=True)
class Locked:
    """Channels that cannot be removed because of one operation."""

    operation: str  # class or function, e.g. "LayerNorm"
    module: str  # name of the module in whose forward it runs
    reason: str
    channels: int  # output channels of layers that it keeps
    macs_share: float  # share of the network's multiply-accumulates in layers that no removal makes cheaper because of it


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together, across every layer that carries them.

    One unit of a group is one channel position; `size` counts them. For a `block`, the one unit is the whole residual branch.
    """

    name: str  # the first layer that produces it, e.g. "layer1.0.conv1"; blocks: "block:layer1.0.conv2"
    kind: str  # "inner", "coupled" (an addition takes its channels from several layers: shortcut-coupled) or "block"
    size: int
    producers: tuple[str, ...]  # layers that lose output channels
    consumers: tuple[str, ...]  # layers that lose input channels
