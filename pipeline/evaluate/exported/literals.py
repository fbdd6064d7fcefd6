"""Sizes that operators of an exported graph hold as literals, after units are gone: shapes, splits, slices, groups, indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from ....targets.onnx.edit import OnnxEditor
from ....targets.onnx.graph import Array, attribute
from ...axes.algebra import Axis
from ...errors import BuildError
from .sources import Axes
from .ties import Ties

Kept = Callable[[Axis], NDArray[np.bool_]]  # which positions of an axis stay


def follow(editor: OnnxEditor, op: onnx.NodeProto, dense: onnx.NodeProto, ties: Ties, kept: Kept) -> None:
    """Change the literals of an operator in place; its constants are cut already.

    Args:
        editor: whose operator it is.
        op: it.
        dense: the same operator in the float graph of the whole network, which `ties` are for.
        ties: the axes.
        kept: which of their positions stay.

    Raises:
        BuildError: no literal can say what stays.
    """
    if op.op_type in ("Reshape", "Expand"):
        _shape(editor, op, 1, ties.tensors.get(dense.output[0]), kept)
    elif op.op_type == "Resize":
        _shape(editor, op, 3, ties.tensors.get(dense.output[0]), kept)
    elif op.op_type == "Split":
        _split(editor, op, [ties.tensors.get(name) for name in dense.output], kept)
    elif op.op_type == "Slice":
        _slice(editor, op, ties.tensors.get(dense.input[0]), kept)
    elif op.op_type == "Gather":
        _gather(editor, op, ties.tensors.get(dense.input[0]) or ties.constants.get(dense.input[0]), kept)
    elif op.op_type in ("Conv", "ConvTranspose") and attribute(op, "group", 1) > 1:
        _groups(editor, op, ties.tensors.get(dense.input[0]), kept)


def _shape(editor: OnnxEditor, op: onnx.NodeProto, at: int, axes: Axes | None, kept: Kept) -> None:
    literal = _literal(editor, op, at)
    if literal is not None and axes is not None and len(literal) == len(axes):
        # 0 and -1 follow by themselves; a 1 is a size that is repeated
        sizes = [n if n < 2 else int(kept(axis).sum()) for n, axis in zip(literal.tolist(), axes, strict=True)]
        _write(editor, op, at, literal, sizes)


def _split(editor: OnnxEditor, op: onnx.NodeProto, sides: Sequence[Axes | None], kept: Kept) -> None:
    known = [axes for axes in sides if axes is not None]
    if len(known) < len(sides):
        return
    masks = [kept(axes[attribute(op, "axis", 0)]) for axes in known]
    if not all(mask.all() for mask in masks):
        del op.input[1:]
        op.input.append(f"{op.name}_sizes")
        editor.put(op.input[1], np.array([mask.sum() for mask in masks], np.int64))
        for given in [a for a in op.attribute if a.name == "num_outputs"]:
            op.attribute.remove(given)


def _slice(editor: OnnxEditor, op: onnx.NodeProto, axes: Axes | None, kept: Kept) -> None:
    starts, ends = _literal(editor, op, 1), _literal(editor, op, 2)
    if axes is None or starts is None or ends is None:
        return
    along, steps = _literal(editor, op, 3), _literal(editor, op, 4)
    along = np.arange(len(starts)) if along is None else along
    first, last = starts.copy(), ends.copy()
    for k, axis in enumerate(along.tolist()):
        mask = kept(axes[axis])
        if mask.all():
            continue
        if steps is not None and steps[k] != 1:
            raise BuildError(f"{op.name} cannot be cut", found=f"steps of {steps[k]} along an axis that loses positions")
        start, end, _ = slice(int(starts[k]), int(ends[k])).indices(len(mask))
        first[k], last[k] = mask[:start].sum(), mask[:end].sum()
    _write(editor, op, 1, starts, first.tolist())
    _write(editor, op, 2, ends, last.tolist())


def _gather(editor: OnnxEditor, op: onnx.NodeProto, axes: Axes | None, kept: Kept) -> None:
    indices = _literal(editor, op, 1)
    if axes is None or indices is None:
        return
    mask = kept(axes[attribute(op, "axis", 0)])
    if not mask.all():
        place = np.cumsum(mask) - 1
        new = place[indices[mask[indices]]] if indices.ndim else place[indices]
        name = f"{op.name}_indices"
        editor.put(name, new.astype(indices.dtype))
        op.input[1] = name


def _groups(editor: OnnxEditor, op: onnx.NodeProto, axes: Axes | None, kept: Kept) -> None:
    if axes is None:
        return
    mask, given = kept(axes[1]), next(a for a in op.attribute if a.name == "group")
    if op.op_type == "Conv":  # its weight counts the inputs of one group
        given.i = int(mask.sum()) // editor.dims(editor.graph.source(op.input[1])[0])[1]
    else:
        given.i = given.i * int(mask.sum()) // len(mask)


def _literal(editor: OnnxEditor, op: onnx.NodeProto, at: int) -> Array | None:
    return editor.value(op.input[at]) if len(op.input) > at and op.input[at] else None


def _write(editor: OnnxEditor, op: onnx.NodeProto, at: int, old: Array, new: Sequence[int]) -> None:
    if list(new) != old.tolist():
        name = f"{op.name}_{at}"  # other operators may share the literal
        editor.put(name, np.array(new, old.dtype))
        op.input[at] = name
