"""Linear layers and matrix products, with and without parameters."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..algebra import Axis, size_of
from ..capture import operator_name
from ..cutting.scaling import CASTS, MOVES
from ..walk import Axes, Value, Walk, rule
from .attention import count_heads

_BETWEEN = {*MOVES, *CASTS, "dropout", "expand"}  # what may stand between a softmax and the product with the values


@rule("linear")
def linear(walk: Walk, node: fx.Node) -> Value:
    """The last axis is cut from the weight, the outputs are new."""
    x, weight = walk.axes(node.args[0]), walk.axes(node.args[1])
    ins = walk.join(x[-1], weight[1], node) if size_of(x[-1]) == size_of(weight[1]) else x[-1]
    outs = weight[0] if len(weight) > 1 else ()
    bias = walk.argument(node, "bias")
    if isinstance(bias, fx.Node):
        outs = walk.join(outs, walk.axes(bias)[0], node)
    walk.cost(node, math.prod(walk.shape(node)) * size_of(ins), *x[:-1], ins, outs)
    walk.store.mark(outs, "mlp")
    return [*x[:-1], outs]


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(walk: Walk, node: fx.Node) -> Value:
    """Rows of the first, columns of the second; what is summed over goes together, and so do batches."""
    a, b = list(walk.axes(node.args[0])), list(walk.axes(node.args[1]))
    return product(walk, node, a, b)


def product(walk: Walk, node: fx.Node, a: Axes, b: Axes) -> Axes:
    """The axes of a @ b."""
    flat_a, flat_b = len(a) == 1, len(b) == 1
    a = [(), *a] if flat_a else a
    b = [*b, ()] if flat_b else b
    summed = walk.join(a[-1], b[-2], node)
    batch = walk.broadcast([a[:-2], b[:-2]], node)
    rows, columns = a[-2], b[-1]
    cost = math.prod(size_of(x) for x in (*batch, rows, columns, summed))
    walk.cost(node, cost, *batch, rows, columns, summed)
    walk.store.mark(summed, "summed")
    for axis in batch:
        walk.store.mark(axis, "batch")
    if _is_attention(node.args[0]):
        walk.store.mark(columns, "value_dim")
    if batch:
        count_heads(walk, node, batch[-1], summed, columns)
    return [*batch, *(() if flat_a else (rows,)), *(() if flat_b else (columns,))]


def _is_attention(node: Any) -> bool:
    """Whether a matrix is a softmax, perhaps after dropout, a reshape or a cast."""
    while isinstance(node, fx.Node) and node.op == "call_function" and operator_name(node) in _BETWEEN:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "call_function" and "softmax" in operator_name(node)


@rule("addmm", "baddbmm", "addbmm")
def addmm(walk: Walk, node: fx.Node) -> Value:
    """A bias and a matrix product."""
    result = product(walk, node, list(walk.axes(node.args[1])), list(walk.axes(node.args[2])))
    return walk.broadcast([result, walk.axes(node.args[0])], node)


@rule("einsum")
def einsum(walk: Walk, node: fx.Node) -> Value:
    """Axes of one letter are one axis; letters that are not in the result are summed over."""
    operands = list(node.args[1])  # type: ignore[arg-type]
    left, right = spelled_out(str(node.args[0]), [len(walk.axes(operand)) for operand in operands])
    axes: dict[str, Axis] = {}
    for term, operand in zip(left.split(","), operands, strict=True):
        for letter, axis in zip(term, walk.axes(operand), strict=True):
            axes[letter] = walk.join(axes[letter], axis, node) if letter in axes else axis
    if len(operands) > 1:
        walk.cost(node, math.prod(size_of(a) for a in axes.values()), *axes.values())
    for letter, axis in axes.items():
        if all(letter in term for term in (*left.split(","), right)):
            walk.store.mark(axis, "batch")
        elif letter not in right:
            walk.store.mark(axis, "summed")
    return [axes[letter] for letter in right]


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[str, str]:
    """Returns the two sides of an einsum equation for operands of these ranks, "..." and an implicit result in letters."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    terms = left.split(",")
    hidden = [rank - len(term) + 3 if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    dots = spare[: max(hidden, default=0)]
    terms = [term.replace("...", "".join(dots[len(dots) - n :])) for term, n in zip(terms, hidden, strict=True)]
    if not arrow:  # what occurs once, in alphabetical order, after what the dots stand for
        letters = Counter("".join(terms))
        right = "..." * bool(dots) + "".join(sorted(x for x, n in letters.items() if n == 1 and x not in dots))
    return ",".join(terms), right.replace("...", "".join(dots))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "bilinear")
def kept_whole(walk: Walk, node: fx.Node) -> Value:
    """Recurrent and bilinear layers keep all units; each weight is used once for each row of the result."""
    weights = [n for n in node.all_input_nodes if n.name in walk.captured.names and len(walk.shape(n)) > 1]
    value = node.meta["val"]
    first = value[0] if isinstance(value, list | tuple) else value
    walk.cost(node, math.prod(first.shape[:-1]) * sum(math.prod(walk.shape(n)) for n in weights))
    return walk.opaque(node)
