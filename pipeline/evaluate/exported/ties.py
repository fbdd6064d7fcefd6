"""Finds the axes of a captured network in its exported graph, by value.

With the same weights and the same inputs, a tensor of the exported graph that equals a tensor of the captured one has its axes,
whatever the exporter renamed, transposed or folded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from torch.utils import _pytree as pytree

from ....targets.onnx.graph import Array, Graph, attribute
from ...axes.algebra import Atom, Axis, fixed
from ...axes.capture import Captured, operator_name
from ...axes.coupling import Coupling
from ...axes.program import Program

Axes = Sequence[Axis]
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Erf", "Clip", "Cast")
_CLOSE = 1e-3  # of the largest value: the same tensor by other kernels


@dataclass(frozen=True)
class Branch:
    """Where a residual branch ends in the exported graph."""

    add: str  # name of the addition
    operand: int  # which of its operands comes from the branch


@dataclass(frozen=True)
class Ties:
    """What the tensors of an exported graph are in the captured one, as far as that could be told."""

    tensors: Mapping[str, Axes]  # activations whose sizes some operator holds
    constants: Mapping[str, Axes]  # parameters and buffers
    branches: Mapping[str, Branch]  # by residual block


def feeds_of(captured: Captured, network: Graph) -> dict[str, Array]:
    """The captured network's example as inputs of its exported graph."""
    names = [value.name for value in network.model.graph.input]
    return dict(zip(names, (leaf.numpy() for leaf in pytree.tree_leaves(captured.example)), strict=True))


def answers(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of a graph by name, as it stands: no operator is fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    used = {value.name for value in session.get_inputs()}
    names = [value.name for value in model.graph.output]
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in used}), strict=True))


def tie(coupling: Coupling, network: Graph) -> Ties:
    """What the exported graph's tensors are in the captured network; both have the weights they have now.

    Args:
        coupling: of the captured network.
        network: its float graph, batch 1, exported from the captured module.
    """
    captured = coupling.walk.captured
    program = Program(captured.module, captured)
    with torch.no_grad():
        for node in program.nodes[:-1]:
            program.value(node)
    wanted = [name for name in _asked(network) if name not in network.constants]
    feeds = feeds_of(captured, network)
    model = onnx.ModelProto()
    model.CopyFrom(network.model)
    have = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in have | feeds.keys())
    seen = feeds | answers(model, feeds)
    constants = dict(_parameters(coupling, program, network))
    floats = (name for name, c in network.constants.items() if c.data_type == onnx.TensorProto.FLOAT and name not in constants)
    folded = {name: value for name in floats if (value := network.array(name)) is not None and value.size > 1}
    tensors = _tensors(coupling, program, seen) | {name: [fixed(n) for n in leaf.shape] for name, leaf in feeds.items()}
    grouped, scales = _grouped(coupling, network, tensors)
    return Ties(
        tensors | _operands(network, tensors) | grouped,
        constants | _tensors(coupling, program, folded) | scales,
        {b.name: found for b in coupling.blocks if (found := _branch(program, network, seen, b.branch)) is not None},
    )


def _asked(network: Graph) -> Iterable[str]:
    """Tensors whose axes a cut has to know."""
    found: dict[str, None] = {}
    for node in network.nodes:
        if node.op_type in ("Reshape", "Expand", "Split", "Resize"):
            found.update(dict.fromkeys((*node.output, node.input[0])))
        if node.op_type in ("Slice", "Gather") or attribute(node, "group", 1) > 1:
            found[node.input[0]] = None
        if node.op_type == "Add":
            found.update(dict.fromkeys((*node.input, *node.output)))
    return found


def _tensors(coupling: Coupling, program: Program, seen: Mapping[str, Array]) -> dict[str, Axes]:
    by_sizes: dict[tuple[int, ...], list[tuple[Array, Axes]]] = {}
    for node, value in program.env.items():
        if isinstance(value, torch.Tensor) and node in coupling.walk.values:
            axes = coupling.walk.axes(node)
            if len(axes) == value.dim():
                by_sizes.setdefault(_sizes(value.shape), []).append((value.numpy(), axes))
    ties = {name: _first(value, by_sizes.get(_sizes(value.shape), ())) for name, value in seen.items()}
    return {name: axes for name, axes in ties.items() if axes is not None}


def _operands(network: Graph, known: Mapping[str, Axes]) -> dict[str, Axes]:
    """Tensors inside an operator of the captured graph, from its result: an element-wise operator's operands have its axes."""
    found: dict[str, Axes] = {}
    for node in reversed(network.nodes):
        result = node.output[0]
        axes = known.get(result, found.get(result))
        if axes is not None and node.op_type in _ELEMENTWISE:
            for name in node.input:
                if name not in known and network.shapes.get(name) == network.shapes.get(result):
                    found[name] = axes
    return found


def _grouped(coupling: Coupling, network: Graph, known: Mapping[str, Axes]) -> tuple[dict[str, Axes], dict[str, Axes]]:
    """GroupNorm, exported as InstanceNormalization of a tensor (n, groups, rest): that tensor, and the constants by group."""
    tensors: dict[str, Axes] = {}
    constants: dict[str, Axes] = {}
    for node in network.nodes:
        before = network.producer.get(node.input[0]) if node.op_type == "InstanceNormalization" else None
        axes = known.get(before.input[0]) if before is not None and before.op_type == "Reshape" else None
        groups = network.shapes.get(node.input[0], ())[1:2]
        outer = None if axes is None or len(axes) < 2 else _outer(coupling, axes[1])
        if axes is not None and outer is not None and groups == (outer.size,):
            tensors[node.input[0]] = [axes[0], (outer,), ()]
            constants |= {name: [(outer,)] for name in node.input[1:]}
    return tensors, constants


def _outer(coupling: Coupling, axis: Axis) -> Atom | None:
    """The first factor of an axis that is a product, written out or known to be one."""
    if len(axis) != 1:
        return axis[0] if axis else None
    labels = axis[0].labels
    if labels is None:
        return None
    return next((p.factors[0] for p in coupling.walk.store.products if np.array_equal(p.vector, labels)), None)


def _sizes(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


def _parameters(coupling: Coupling, program: Program, network: Graph) -> Iterator[tuple[str, Axes]]:
    """The constants that are parameters or buffers, whole, perhaps with a BatchNorm folded in."""
    stored = {name: (program.tensor(name).numpy(), axes) for name, axes in coupling.walk.parameters.items()}
    by_size: dict[int, list[tuple[Array, Axes]]] = {}
    for known in (*stored.values(), *_folded(coupling, program)):
        by_size.setdefault(known[0].size, []).append(known)
    for name, constant in network.constants.items():
        value = network.array(name)
        if constant.data_type == onnx.TensorProto.FLOAT and value is not None and value.size > 1:
            first = [stored[name]] if name in stored else []
            if (found := _first(value, (*first, *by_size.get(value.size, ())))) is not None:
                yield name, found


def _folded(coupling: Coupling, program: Program) -> Iterator[tuple[Array, Axes]]:
    """Weight and bias of every convolution whose value a BatchNorm alone reads, as the exporter makes one operator of both."""
    for node in program.nodes:
        readers = list(node.users)
        if not operator_name(node).startswith("conv") or len(readers) != 1 or operator_name(readers[0]) != "batch_norm":
            continue
        weight, norm = program.stored(node.args[1]), readers[0]
        scale, shift, mean, variance = (program.tensor(n) if (n := program.stored(a)) else None for a in norm.args[1:5])
        if weight is None or mean is None or variance is None:
            continue
        factor = (variance + float(norm.args[7])).rsqrt() * (1.0 if scale is None else scale)  # type: ignore[arg-type]
        given = program.stored(node.args[2]) if len(node.args) > 2 else None
        bias = (program.tensor(given) if given else 0.0) - mean
        out = 1 if "transpose" in operator_name(node) else 0
        whole = program.tensor(weight)
        along = [-1 if k == out else 1 for k in range(whole.dim())]
        if whole.shape[out] == len(factor):
            yield (whole * factor.view(along)).numpy(), coupling.walk.parameters[weight]
        yield (bias * factor + (0.0 if shift is None else shift)).numpy(), [coupling.walk.axes(node)[1]]


def _first(value: Array, candidates: Iterable[tuple[Array, Axes]]) -> Axes | None:
    """The axes of a tensor that is one of some tensors with known axes."""
    found = (_in_order(value, other, axes) for other, axes in candidates)
    return next((axes for axes in found if axes is not None), None)


def _in_order(value: Array, other: Array, axes: Axes) -> Axes | None:
    """The axes of a tensor that is another one with its axes in some order, and with or without axes of size 1."""
    if value.dtype.kind == "f" and abs(float(value.sum(dtype=np.float64) - other.sum(dtype=np.float64))) > _CLOSE * float(
        np.abs(value).sum(dtype=np.float64)
    ):
        return None
    sizes = [n for n in value.shape if n > 1]
    long = [k for k in range(other.ndim) if other.shape[k] > 1]
    squeezed, flat = other.reshape([other.shape[k] for k in long]), value.ravel()
    for order in itertools.permutations(range(len(long))):
        if [squeezed.shape[k] for k in order] == sizes and _equal(flat, squeezed.transpose(order).ravel()):
            left = iter(order)
            return [() if n == 1 else axes[long[next(left)]] for n in value.shape]
    return None


def _branch(program: Program, network: Graph, seen: Mapping[str, Array], name: str) -> Branch | None:
    node = next(n for n in program.nodes if n.name == name)
    (end,) = node.users
    total, part = program.env[end].numpy(), program.env[node].numpy()
    for add in network.nodes:
        if add.op_type == "Add" and add.output[0] in seen and _equal(seen[add.output[0]], total):
            for operand, tensor in enumerate(add.input):
                if tensor in seen and _equal(seen[tensor], part):
                    return Branch(add.name, operand)
    return None


def _equal(one: Array, other: Array) -> bool:
    if one.shape != other.shape or one.dtype.kind != other.dtype.kind:
        return False
    if one.dtype.kind != "f":
        return bool((one == other).all())
    close = _CLOSE * float(np.abs(other).max(initial=0.0))
    first = slice(0, 64)  # most tensors differ in their first values
    return bool((np.abs(one.ravel()[first] - other.ravel()[first]) <= close).all() and (np.abs(one - other) <= close).all())
