"""Layer-wise reconstruction of a network from which units were removed.

`stitched` re-fits every layer on its own to the dense network's inputs: the search judges by it. `sequential` re-fits all layers
of one network in the order they run, each on the inputs that the pruned layers before it really produce; the last projection of a
residual branch is re-fit to the dense sum less the pruned shortcut, so that it also repairs what earlier layers lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..axes.coupling import Coupling, Plan
from ..axes.cutting.sizes import SizedCalls
from ..axes.cutting.surgery import cut, parameter_masks
from ..axes.program import Layer, Program
from ..network.compute import CPU, Compute
from ..network.exact_mode import exact_arithmetic
from ..network.modes import borrowed
from ..network.row_sampling import output_strips
from ..score.layer_moments import CHUNK, LayerMoments, counted
from .least_squares import DAMPING, damping_of, positions_for, solve_intercept
from .memory import SOLVING_BYTES

Masks = Mapping[str, Mapping[int, NDArray[np.bool_]]]


class Fitter:
    """Re-fits single layers against the dense network's inputs, each once for each set of inputs that are left."""

    def __init__(self, moments: LayerMoments) -> None:
        self.moments = moments
        self._solved: dict[tuple[str, bytes], tuple[torch.Tensor, torch.Tensor]] = {}

    def fitted(self, name: str, kept: NDArray[np.bool_]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weight (outputs, kept inputs, ...) and change of the bias (outputs,) of a layer that reads only some of its inputs.

        The change is zero for a layer without a bias. None: the layer's moments are not known.
        """
        gram = self.moments.gram.get(name)
        if gram is None:
            return None
        key = name, kept.tobytes()
        if key not in self._solved:
            weight = self.moments.module.get_parameter(name).detach()
            keep = torch.from_numpy(np.flatnonzero(np.repeat(kept, weight[0, 0].numel())))
            flat = weight.flatten(1).double()
            rows = torch.cat([keep, torch.tensor([len(gram) - 1])])
            full = torch.cat([flat, flat.new_zeros(len(flat), 1)], 1)
            solved = solve_intercept(gram[rows][:, rows], (full @ gram)[:, rows], flat[:, keep], DAMPING, None)
            shape = (len(weight), int(kept.sum()), *weight.shape[2:])
            self._solved[key] = solved[:, :-1].to(weight.dtype).view(shape), solved[:, -1].to(weight.dtype)
        return self._solved[key]


def stitched(coupling: Coupling, plan: Plan, sized: Mapping[str, SizedCalls], fitter: Fitter) -> nn.Module:
    """The network without a plan's units, every layer that lost inputs re-fit to the dense network's outputs by itself."""
    small = cut(coupling, plan, sized)
    dense = coupling.walk.captured.module
    masks = parameter_masks(coupling, coupling.gone(plan))
    tensors = dict(small.named_parameters())
    with torch.no_grad():
        for name, axes in masks.items():
            fitted = fitter.fitted(name, axes[1]) if 1 in axes else None
            if fitted is None or name not in tensors:  # inside a branch that goes
                continue
            weight, shift = fitted
            rows = _rows(axes, len(weight))
            scale = _scale(tensors[name], dense.get_parameter(name), axes).to(weight)
            tensors[name].copy_(weight[rows] * scale.view(-1, *[1] * (weight.ndim - 1)))
            bias = fitter.moments.bias[name]
            if bias is not None:
                tensors[bias].add_(shift[rows] * scale)
    return small


def sequential(
    coupling: Coupling,
    plan: Plan,
    sized: Mapping[str, SizedCalls],
    inputs: Any,
    *,
    valid: torch.Tensor | None = None,
    compute: Compute = CPU,
    damping: float = DAMPING,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """The network without a plan's units after sequential layer-wise reconstruction against the dense network's activations.

    Args:
        coupling: of the dense network, see `axes.coupling.couple`.
        plan: group -> units that go.
        sized: see `axes.cutting.gate.Checked`.
        inputs: network inputs of the calibration set, the samples along axis 0; the activations of all of them are held for a
            few layers.
        valid: (n, tokens), False for padding, which then does not count in layers on tokens.
        compute: its device and memory are used; a layer whose Hessian does not fit keeps its weights.
        damping: share of the mean diagonal added to the diagonal.
        progress: told the share of operators done.

    Returns:
        A new network of the user's class, eval mode.
    """
    small = cut(coupling, plan, sized).eval()
    dense = coupling.walk.captured.module
    masks = parameter_masks(coupling, coupling.gone(plan))
    device = compute.device
    programs = [Program.of(net, inputs) for net in (dense, small)]
    with borrowed(dense, device), borrowed(small, device), exact_arithmetic(device), torch.no_grad():
        one, other = (program.fed(inputs, device) for program in programs)
        lockstep = _Lockstep(one, other, masks, damping, compute, valid)
        lockstep.changed = bool(coupling.left_out(plan))
        lockstep.run(progress)
    return small


class _Lockstep:
    """Runs the pruned network operator by operator, and the dense one as far ahead as its activations are needed as targets."""

    def __init__(
        self, dense: Program, small: Program, masks: Masks, damping: float, compute: Compute, valid: torch.Tensor | None
    ) -> None:
        self.dense, self.small, self.masks, self.damping, self.compute, self.valid = dense, small, masks, damping, compute, valid
        self.dense_layers = {layer.weight: layer for layer in dense.layers()}
        self.layers = {layer.node: layer for layer in small.layers()}
        self.changed = False  # whether a layer before this one has lost units

    def run(self, progress: Callable[[float], None] | None) -> None:
        """Reconstruct every layer of the pruned network in place."""
        count = len(self.small.nodes)
        for k, node in enumerate(self.small.nodes):
            if node.op == "output":
                break
            self._visit(node)
            self.small.drop(k)
            if progress is not None:
                progress((k + 1) / count)
        self.small.env.clear()
        self.dense.env.clear()

    def _visit(self, node: torch.fx.Node) -> None:
        """Compute a node's value, its operands first; a layer is re-fit before it is computed."""
        small = self.small
        if node in small.env:
            return
        for source in node.all_input_nodes:
            self._visit(source)
        layer = self.layers.get(node)
        self.changed = self.changed or any(small.stored(a) in self.masks for a in node.all_input_nodes)
        if layer is not None:
            self._forget(self.dense_layers[layer.weight])
            weight = small.tensor(layer.weight)
            if self.changed and SOLVING_BYTES * weight[0].numel() ** 2 <= self.compute.memory_bytes:
                self._fit(layer)
        small.env[node] = small.evaluate(node)

    def _forget(self, layer: Layer) -> None:
        """Compute the dense network up to a layer, and drop what nothing after it reads."""
        here = self.dense.position[layer.node]
        done = max((self.dense.position[n] for n in self.dense.env), default=-1)
        for k in range(done + 1, here + 1):
            self.dense.value(self.dense.nodes[k])
            self.dense.drop(k - 1)

    def _fit(self, layer: Layer) -> None:
        small, dense = self.small, self.dense
        full = self.dense_layers[layer.weight]
        axes = self.masks.get(layer.weight, {})
        weight = small.tensor(layer.weight)
        inputs = small.env[layer.data]
        rows = _rows(axes, len(dense.tensor(layer.weight))).to(inputs.device)
        ratio = _scale(weight, dense.tensor(layer.weight), axes)
        norm, end = small.norm_after(layer.node), layer.node
        dense_norm, dense_end = dense.norm_after(full.node), full.node
        shape = (-1,) if layer.linear else (1, -1, *[1] * (weight.ndim - 2))
        scale, shift = _affine(small, norm, len(weight), inputs)
        if norm is not None and dense_norm is not None:
            end, dense_end = norm, dense_norm
        mine, theirs = small.sum_after(end), dense.sum_after(dense_end)
        if mine is not None and theirs is not None and (norm is None) == (dense_norm is None):
            self._visit(mine[1])  # a projection shortcut runs after the branch beside it
            stream = dense.value(theirs[0]).index_select(layer.channels, rows)
            target = (stream - small.env[mine[1]] - shift.view(shape)) / scale.view(shape)
        else:
            target = dense.value(full.node).index_select(layer.channels, rows)
        fitted, bias = self._regress(layer, inputs, target * ratio.to(target).view(shape), norm is not None)
        small.put(layer.weight, fitted)
        if layer.bias is not None:
            small.put(layer.bias, bias)
            bias = torch.zeros_like(bias)
        if norm is not None:
            self._match(norm, layer, scale, shift, bias)

    def _match(self, norm: torch.fx.Node, layer: Layer, scale: torch.Tensor, shift: torch.Tensor, bias: torch.Tensor) -> None:
        """Write scale * (outputs + bias) + shift as a BatchNorm with the outputs' own statistics."""
        small = self.small
        outputs = layer.outputs(small.evaluate(layer.node))
        var, mean = torch.var_mean(outputs.float(), (0, 2), correction=0)
        gain, offset, running_mean, running_var = (small.stored(a) for a in norm.args[1:5])
        assert gain is not None  # Program.norm_after
        assert offset is not None
        assert running_mean is not None
        assert running_var is not None
        small.put(running_mean, mean)
        small.put(running_var, var)
        small.put(gain, scale * (var + _epsilon(norm)).sqrt())
        small.put(offset, shift + scale * (bias + mean))

    def _regress(
        self, layer: Layer, inputs: torch.Tensor, target: torch.Tensor, normed: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Least squares: the weight and the bias that give `target` from `inputs`; a bias of 0 where there is none."""
        weight = self.small.tensor(layer.weight)
        flat = layer.outputs(target)
        positions = flat.shape[2]
        k = weight[0].numel()
        most = positions_for(k) // len(inputs)
        each = max(1, min(positions, most))
        gram = torch.zeros(k + 1, k + 1, dtype=torch.float64, device=inputs.device)
        cross = torch.zeros(len(weight), k + 1, dtype=torch.float64, device=inputs.device)
        constant, seen = 1.0 if normed or layer.bias is not None else 0.0, 0
        for start in range(0, len(inputs), CHUNK):
            part = slice(start, start + CHUNK)
            rows = layer.rows(target, start // CHUNK, most)
            if rows is not None:
                x, t = counted(layer.columns_of(inputs[part], rows), None), counted(output_strips(target[part], rows), None)
            else:
                # another even set of positions for every chunk, so that all of them are seen
                picks = (torch.arange(each, device=inputs.device) * positions // each + start // CHUNK) % positions
                own = None if self.valid is None else self.valid[part]
                own = own if own is None or own.shape[1] != positions else own[:, picks.to(own.device)]
                x, t = counted(layer.columns(inputs[part])[:, :, picks], own), counted(flat[part][:, :, picks], own)
            x = torch.cat([x, x.new_full((1, x.shape[1]), constant)])
            seen += x.shape[1]
            gram += (x @ x.T).double()
            cross += (t @ x.T).double()
        damping = damping_of(k, seen, self.damping)
        solved = solve_intercept(gram, cross, weight.flatten(1).double(), damping, None)
        return solved[:, :-1].to(weight).view_as(weight), solved[:, -1].to(weight)


def _rows(axes: Mapping[int, NDArray[np.bool_]], count: int) -> torch.Tensor:
    """The outputs that stay."""
    return torch.from_numpy(np.flatnonzero(axes[0])) if 0 in axes else torch.arange(count)


def _scale(small: torch.Tensor, dense: torch.Tensor, axes: Mapping[int, NDArray[np.bool_]]) -> torch.Tensor:
    """What surgery multiplied each row with: not 1 for queries whose attention lost dimensions, see `axes.cutting.scaling`."""
    full = dense.detach()[_rows(axes, len(dense)).to(dense.device)]
    if 1 in axes:
        full = full[:, torch.from_numpy(np.flatnonzero(axes[1])).to(dense.device)]
    full, own = full.flatten(1).double(), small.detach().flatten(1).double()
    ratio = (own * full).sum(1) / full.square().sum(1).clamp_min(1e-30)
    return torch.where((own - ratio[:, None] * full).abs().amax(1) <= 1e-5 * own.abs().amax(1), ratio, 1.0)


def _affine(program: Program, norm: torch.fx.Node | None, count: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in eval mode as (scale, shift) per channel."""
    if norm is None:
        return like.new_ones(count), like.new_zeros(count)
    gain, offset, mean, var = (program.tensor(program.stored(a) or "") for a in norm.args[1:5])
    scale = gain / (var + _epsilon(norm)).sqrt()
    scale = torch.where(scale.abs() < 1e-6, torch.full_like(scale, 1e-6), scale)
    return scale.clone(), (offset - mean * scale).clone()


def _epsilon(norm: torch.fx.Node) -> float:
    return float(norm.args[7])  # type: ignore[arg-type]
