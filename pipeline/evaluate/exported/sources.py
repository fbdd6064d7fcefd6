"""Maps the constants of an exported graph to parameters and buffers of the captured network, by value.

A constant may be a parameter with its axes in another order, or a convolution's weight or bias with the BatchNorm after it folded
in. Knowing which, the graph can be given the weights of another network of the same make.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import fx

from ....targets.onnx.graph import Array, Graph
from ...axes.algebra import Axis
from ...axes.capture import operator_name
from ...axes.coupling import Coupling
from ...axes.program import Program

Axes = Sequence[Axis]
CLOSE = 1e-3  # of the largest value: the same tensor by other kernels


@dataclass(frozen=True)
class Source:
    """The parameter or buffer that a constant holds."""

    parameter: str  # a parameter or buffer, or the convolution's weight
    folded: fx.Node | None  # the convolution whose BatchNorm is folded in
    bias: bool  # of that convolution: its bias, not its weight
    order: tuple[int, ...]  # for each axis of the constant that of the tensor, -1 for an axis of size 1 that it does not have
    axes: Axes  # of the constant

    def made(self, program: Program, factors: Mapping[str, Array]) -> Array:
        """The constant of a network with other weights, and perhaps fewer units.

        Args:
            program: the network.
            factors: what the rows of some parameters are multiplied by.
        """
        if self.folded is None:
            value: Array = program.tensor(self.parameter).cpu().numpy()
            if self.parameter in factors:
                value = value * factors[self.parameter].reshape(-1, *(1,) * (value.ndim - 1))
        else:
            value = folded(program, self.folded, bias=self.bias)
        long = sorted(k for k in self.order if k >= 0)
        plain = value.reshape([value.shape[k] for k in long]).transpose([long.index(k) for k in self.order if k >= 0])
        return plain.reshape([value.shape[k] if k >= 0 else 1 for k in self.order])


def sources_of(coupling: Coupling, program: Program, network: Graph) -> dict[str, Source]:
    """The constants of a graph that are parameters or buffers, whole, perhaps with a BatchNorm folded in.

    Args:
        coupling: of the captured network.
        program: it, with the weights that the graph was exported with.
        network: the float graph.
    """
    parameters = coupling.walk.parameters.items()
    stored = {name: (program.tensor(name).numpy(), Source(name, None, False, (), axes)) for name, axes in parameters}
    by_size: dict[int, list[tuple[Array, Source]]] = {}
    for known in (*stored.values(), *_all_folded(coupling, program)):
        by_size.setdefault(known[0].size, []).append(known)
    found = {}
    for name, constant in network.constants.items():
        value = network.array(name)
        if constant.data_type != onnx.TensorProto.FLOAT or value is None:
            continue
        first = [stored[name]] if name in stored else []
        # a single number is taken by its name alone
        for other, source in (*first, *(by_size.get(value.size, ()) if value.size > 1 else ())):
            order = order_of(value, other)
            if order is not None:
                axes = [source.axes[k] if k >= 0 else () for k in order]
                found[name] = Source(source.parameter, source.folded, source.bias, order, axes)
                break
    return found


def folded(program: Program, node: fx.Node, *, bias: bool) -> Array:
    """Weight, or bias, of a convolution with the BatchNorm after it folded in, as the exporter makes one operator of both."""
    (norm,) = node.users
    scale, shift, mean, variance = (program.tensor(n) if (n := program.stored(a)) else None for a in norm.args[1:5])
    assert mean is not None  # _all_folded
    assert variance is not None
    factor = (variance + float(norm.args[7])).rsqrt() * (1.0 if scale is None else scale)  # type: ignore[arg-type]
    found: torch.Tensor
    if bias:
        given = program.stored(node.args[2]) if len(node.args) > 2 else None
        found = ((program.tensor(given) if given else 0.0) - mean) * factor + (0.0 if shift is None else shift)
        return found.cpu().numpy()
    weight = program.tensor(program.stored(node.args[1]) or "")
    out = 1 if "transpose" in operator_name(node) else 0
    along = [-1 if k == out else 1 for k in range(weight.dim())]
    found = weight * factor.view(along) if weight.shape[out] == len(factor) else weight
    return found.cpu().numpy()


def order_of(value: Array, other: Array) -> tuple[int, ...] | None:
    """For each axis of a tensor that of another with the same values; -1 for an axis of size 1. None: they are not the same."""
    if value.dtype.kind == "f" and abs(float(value.sum(dtype=np.float64) - other.sum(dtype=np.float64))) > CLOSE * float(
        np.abs(value).sum(dtype=np.float64)
    ):
        return None
    sizes = [n for n in value.shape if n > 1]
    long = [k for k in range(other.ndim) if other.shape[k] > 1]
    squeezed, flat = other.reshape([other.shape[k] for k in long]), value.ravel()
    for order in itertools.permutations(range(len(long))):
        if [squeezed.shape[k] for k in order] == sizes and equal(flat, squeezed.transpose(order).ravel()):
            left = iter(order)
            return tuple(-1 if n == 1 else long[next(left)] for n in value.shape)
    return None


def equal(one: Array, other: Array) -> bool:
    """Whether two tensors are one, computed by different kernels."""
    if one.shape != other.shape or one.dtype.kind != other.dtype.kind:
        return False
    if one.dtype.kind != "f":
        return bool((one == other).all())
    close = CLOSE * float(np.abs(other).max(initial=0.0))
    first = slice(0, 64)  # most tensors differ in their first values
    return bool((np.abs(one.ravel()[first] - other.ravel()[first]) <= close).all() and (np.abs(one - other) <= close).all())


def _all_folded(coupling: Coupling, program: Program) -> Iterator[tuple[Array, Source]]:
    for node in program.nodes:
        readers = list(node.users)
        if not operator_name(node).startswith("conv") or len(readers) != 1 or operator_name(readers[0]) != "batch_norm":
            continue
        name = program.stored(node.args[1])
        if name is None or any(program.stored(a) is None for a in readers[0].args[3:5]):
            continue
        yield folded(program, node, bias=False), Source(name, node, False, (), coupling.walk.parameters[name])
        yield folded(program, node, bias=True), Source(name, node, True, (), [coupling.walk.axes(node)[1]])
