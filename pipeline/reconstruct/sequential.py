"""Sequential layer-wise reconstruction of a pruned network.

Errors add up with depth, so all layers are re-fit in the order they run, each on the inputs that the pruned layers before it
really produce, to what the dense network computes there. The last layer of a residual branch is re-fit to the dense sum less the
pruned shortcut, so that it also repairs what earlier layers lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
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
from ..score.layer_moments import CHUNK, counted
from .least_squares import damping_of, positions_for, solve_intercept
from .memory import SOLVING_BYTES
from .stitching import rows_of, scale_of

Left = Mapping[str, Mapping[int, NDArray[np.bool_]]]  # parameter -> axis -> which positions are left
Choose = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # layer, mask, G (k, k), C (outputs, k) -> mask


def sequential(
    coupling: Coupling,
    plan: Plan,
    sized: Mapping[str, SizedCalls],
    inputs: Any,
    *,
    dense: Program | None = None,
    valid: torch.Tensor | None = None,
    compute: Compute = CPU,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """The network without a plan's units after sequential layer-wise reconstruction against the dense network's activations.

    Args:
        coupling: of the dense network, see `axes.coupling.couple`.
        plan: group -> units that go.
        sized: see `axes.cutting.gate.Checked`.
        inputs: network inputs of the calibration set, the samples along axis 0; the activations of all of them are held for a
            few layers.
        dense: program of the dense network for as many samples, where several plans are solved; captured if None.
        valid: (n, tokens), False for padding, which then does not count in layers on tokens.
        compute: its device and memory are used; a layer whose Hessian does not fit keeps its weights.
        progress: told the share of operators done.

    Returns:
        A new network of the user's class, eval mode.
    """
    small = cut(coupling, plan, sized).eval()
    left = parameter_masks(coupling, coupling.gone(plan))
    how = _Lockstep(compute, left=left, valid=valid, changed=bool(coupling.left_out(plan)))
    how.run(dense or Program.of(coupling.walk.captured.module, inputs), small, inputs, progress)
    return small


def sequential_masked(
    net: nn.Module,
    masks: Mapping[str, torch.Tensor],
    inputs: Any,
    *,
    compute: Compute = CPU,
    fixed: Collection[str] = (),
    choose: Choose | None = None,
    progress: Callable[[float], None] | None = None,
) -> nn.Module:
    """`sequential` for masks: each output is re-fit on the connections its mask leaves.

    Args:
        net: dense network with plain weights, eval mode.
        masks: layer -> 1 where a connection stays, in the weight's shape. A layer without one keeps all, and is solved too.
        inputs: network inputs of the calibration set, the samples along axis 0.
        compute: its device and memory are used; a layer whose Hessian does not fit keeps its weights.
        fixed: layers that stay as they are.
        choose: recomputes the mask of a layer in `masks` from the layer's own moments; it must keep as many connections.
        progress: told the share of operators done.

    Returns:
        A new network, eval mode; its weights are exactly zero where their masks are.
    """
    small = copy.deepcopy(net).eval()
    how = _Lockstep(compute, masks=masks, fixed=fixed, choose=choose, changed=True)
    how.run(Program.of(net, inputs), small, inputs, progress)
    return small


class _Lockstep:
    """Runs the pruned network operator by operator, and the dense one as far ahead as its activations are needed as targets."""

    dense: Program
    small: Program

    def __init__(
        self,
        compute: Compute,
        *,
        left: Left | None = None,
        valid: torch.Tensor | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
        fixed: Collection[str] = (),
        choose: Choose | None = None,
        changed: bool = False,
    ) -> None:
        self.compute, self.left, self.valid = compute, left or {}, valid
        self.masks = {f"{name}.weight": mask for name, mask in (masks or {}).items()}
        self.fixed, self.choose = {f"{name}.weight" for name in fixed}, choose
        self.changed = changed  # whether a layer before this one has lost anything
        self._sums: set[torch.fx.Node] = set()  # those that a layer is being re-fit to

    def run(self, dense: Program, small: nn.Module, inputs: Any, progress: Callable[[float], None] | None) -> None:
        """Reconstruct every layer of the pruned network in place."""
        device = self.compute.device
        pruned = Program.of(small, inputs)
        with borrowed(dense.module, device), borrowed(small, device), exact_arithmetic(device), torch.no_grad():
            self.dense, self.small = (program.fed(inputs, device) for program in (dense, pruned))
            self.dense_layers = {layer.weight: layer for layer in self.dense.layers()}
            self.layers = {layer.node: layer for layer in self.small.layers()}
            self._walk(progress)
            self.small.env.clear()
            self.dense.env.clear()

    def _walk(self, progress: Callable[[float], None] | None) -> None:
        count = len(self.small.nodes)
        for k, node in enumerate(self.small.nodes):
            if node.op == "output":
                break
            self._visit(node)
            self.small.drop(k)
            if progress is not None:
                progress((k + 1) / count)

    def _visit(self, node: torch.fx.Node) -> None:
        """Compute a node's value, its operands first; a layer is re-fit before it is computed."""
        small = self.small
        if node in small.env:
            return
        for source in node.all_input_nodes:
            self._visit(source)
        layer = self.layers.get(node)
        if layer is not None and layer.weight not in self.dense_layers:  # of a grouped convolution one group is left
            layer = None
        self.changed = self.changed or any(small.stored(a) in self.left for a in node.all_input_nodes)
        if layer is not None:
            self._forget(self.dense_layers[layer.weight])
            weight = small.tensor(layer.weight)
            fits = SOLVING_BYTES * weight[0].numel() ** 2 <= self.compute.memory_bytes
            if self.changed and fits and layer.weight not in self.fixed:
                self._fit(layer)
            elif layer.weight in self.masks:
                small.put(layer.weight, weight * self.masks[layer.weight].to(weight))
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
        axes = self.left.get(layer.weight, {})
        weight = small.tensor(layer.weight)
        inputs = small.env[layer.data]
        rows = rows_of(axes, len(dense.tensor(layer.weight))).to(inputs.device)
        ratio = scale_of(weight, dense.tensor(layer.weight), axes)
        norm, end = small.norm_after(layer.node), layer.node
        dense_norm, dense_end = dense.norm_after(full.node), full.node
        shape = (-1,) if layer.linear else (1, -1, *[1] * (weight.ndim - 2))
        scale, shift = _affine(small, norm, len(weight), inputs)
        if norm is not None and dense_norm is not None:
            end, dense_end = norm, dense_norm
        mine, theirs = small.sum_after(end), dense.sum_after(dense_end)
        if mine is not None and theirs is not None and mine[0] not in self._sums and (norm is None) == (dense_norm is None):
            self._sums.add(mine[0])
            self._visit(mine[1])  # a projection shortcut runs after the branch beside it, and is re-fit to its own outputs
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
        damping = damping_of(k, seen)
        solved = solve_intercept(gram, cross, weight.flatten(1).double(), damping, self._support(layer.weight))
        return solved[:, :-1].to(weight).view_as(weight), solved[:, -1].to(weight)

    def _support(self, weight: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """Returns a function from a layer's centred moments to its mask (outputs, k); None for a layer without a mask."""
        mask = self.masks.get(weight)
        if mask is None:
            return None
        flat, choose, name = mask.flatten(1).cpu(), self.choose, weight.removesuffix(".weight")
        return lambda gram, target: flat if choose is None else choose(name, flat, gram, target)


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
