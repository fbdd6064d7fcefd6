"""What is cut when a unit goes, and what goes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """Positions of one axis of one parameter or buffer, by the name it has in the user's module."""

    parameter: str
    axis: int
    indices: tuple[int, ...]  # rising

    @property
    def layer(self) -> str:
        """Name of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Unit:
    """The smallest thing that can be removed: every slice that goes when it goes."""

    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Group:
    """Units of the same make: one channel each, one hidden unit, one head, one dimension of all heads.

    `kind` is one of channel, mlp, group (of a grouped convolution), head, head_dim (of queries and keys), value_dim (of values
    and the output projection) and stream (the width several residual branches write to).
    """

    name: str
    kind: str
    units: Sequence[Unit]


@dataclass(frozen=True)
class Block:
    """A residual branch that can be left out whole."""

    name: str
    modules: tuple[str, ...]  # that only the branch calls, in the order they end; the last one ends the branch
    groups: tuple[str, ...]  # that lie inside
    branch: str  # the operator whose value is added to the shortcut
    operators: tuple[int, ...]  # inside, as positions in the costs of the walk
    unused: tuple[str, ...] = ()  # of its modules, those that stay without it, because `forward` looks at them
    shape: tuple[int, ...] = ()  # of what the last module gives for a sample, or for a window of one; () where that is not known
    end: str = ""  # the operator that gives it
    full: bool = False  # zeros of that shape stand for it, because `forward` permutes or adds to them; else one zero


@dataclass(frozen=True)
class Locked:
    """Multiply-accumulates that stay as they are, and what keeps them."""

    operation: str
    module: str
    reason: str
    macs: int
