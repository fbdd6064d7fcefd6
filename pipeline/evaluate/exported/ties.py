"""Finds the axes of a captured network in its exported graph, by value.

With the same weights and the same inputs, a tensor of the exported graph that equals a tensor of the captured one has its axes,
whatever the exporter renamed, transposed or folded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from torch import fx
from torch.utils import _pytree as pytree

from ....targets.onnx.graph import Array, Graph, attribute
from ...axes.algebra import Atom, Axis, fixed, size_of
from ...axes.capture import Captured
from ...axes.coupling import Coupling
from ...axes.program import Program
from .sources import Axes, Source, equal, order_of, sources_of

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Erf", "Clip", "Cast")


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
    sources: Mapping[str, Source]  # of the constants that are parameters or buffers


def feeds_of(captured: Captured, network: Graph) -> dict[str, Array]:
    """The captured network's example as inputs of its exported graph."""
    names = [value.name for value in network.model.graph.input]
    return dict(zip(names, (leaf.numpy() for leaf in pytree.tree_leaves(captured.example)), strict=True))


def answers(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of a graph by name, as it stands: no operator is fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside PyTorch's threads it slows both down
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
    values: dict[fx.Node, torch.Tensor] = {}
    with torch.no_grad():
        for node in program.nodes[:-1]:
            value = program.value(node)
            if isinstance(value, torch.Tensor):
                values[node] = value.clone()  # operators in place change it later
    wanted = [name for name in _asked(network) if name not in network.constants]
    feeds = feeds_of(captured, network)
    model = onnx.ModelProto()
    model.CopyFrom(network.model)
    have = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in have | feeds.keys())
    seen = feeds | answers(model, feeds)
    sources = sources_of(coupling, program, network)
    constants = {name: source.axes for name, source in sources.items()}
    floats = (name for name, c in network.constants.items() if c.data_type == onnx.TensorProto.FLOAT and name not in constants)
    folded = {name: value for name in floats if (value := network.array(name)) is not None and value.size > 1}
    tensors = _tensors(coupling, values, seen) | {name: [fixed(n) for n in leaf.shape] for name, leaf in feeds.items()}
    grouped, scales = _grouped(coupling, network, tensors)
    return Ties(
        tensors | _operands(network, tensors) | _regrouped(coupling, network, tensors) | grouped,
        constants | _tensors(coupling, values, folded) | scales,
        {b.name: found for b in coupling.blocks if (found := _branch(values, network, seen, b.branch)) is not None},
        sources,
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


def _tensors(coupling: Coupling, values: Mapping[fx.Node, torch.Tensor], seen: Mapping[str, Array]) -> dict[str, Axes]:
    by_sizes: dict[tuple[int, ...], list[tuple[Array, Axes]]] = {}
    for node, value in values.items():
        if node in coupling.walk.values:
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


def _regrouped(coupling: Coupling, network: Graph, known: Mapping[str, Axes]) -> dict[str, Axes]:
    """Tensors inside an operator of the captured graph, from its input: what a channel shuffle reshapes that to."""
    found: dict[str, Axes] = {}
    for node in network.nodes:
        if node.op_type == "Reshape" and node.input[0] in known and node.output[0] not in known:
            axes = _split(coupling, known[node.input[0]], network.shapes.get(node.output[0], ()))
            found |= {} if axes is None else {node.output[0]: axes}
    return found


def _split(coupling: Coupling, axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Axes after a reshape to `shape`; None where that is not known, or splits an axis otherwise than the captured graph."""
    queue = [atom for axis in axes for atom in axis]
    found: list[Axis] = []
    for size in shape:
        taken: list[Atom] = []
        while (need := size // size_of(tuple(taken))) > 1:
            if not queue:
                return None
            atom = queue.pop(0)
            if atom.size > need:
                parts = _factors(coupling, atom, need)
                if parts is None:
                    return None
                atom, rest = parts
                queue.insert(0, rest)
            taken.append(atom)
        if size_of(tuple(taken)) != size:
            return None
        found.append(tuple(taken))
    return None if any(atom.size > 1 for atom in queue) else found


def _factors(coupling: Coupling, atom: Atom, outer: int) -> tuple[Atom, Atom] | None:
    """An atom as two, the first of size `outer`; None where it is not known as such a product."""
    if atom.labels is None:
        return (Atom(outer), Atom(atom.size // outer)) if atom.size % outer == 0 else None
    for product in coupling.walk.store.products:
        if len(product.factors) == 2 and product.factors[0].size == outer and np.array_equal(product.vector, atom.labels):
            return product.factors[0], product.factors[1]
    return None


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


def _first(value: Array, candidates: Iterable[tuple[Array, Axes]]) -> Axes | None:
    """The axes of a tensor that is one of some tensors with known axes."""
    for other, axes in candidates:
        order = order_of(value, other)
        if order is not None:
            return [axes[k] if k >= 0 else () for k in order]
    return None


def _branch(values: Mapping[fx.Node, torch.Tensor], network: Graph, seen: Mapping[str, Array], name: str) -> Branch | None:
    node = next(n for n in values if n.name == name)
    (end,) = node.users
    total, part = values[end].numpy(), values[node].numpy()
    for add in network.nodes:
        if add.op_type == "Add" and add.output[0] in seen and equal(seen[add.output[0]], total):
            for operand, tensor in enumerate(add.input):
                if tensor in seen and equal(seen[tensor], part):
                    return Branch(add.name, operand)
    return None
