"""Local curvature of the loss, one number per connection (in place of the paper's finite differences, section 3).

    gauss_newton          diagonal of the Gauss-Newton matrix (random signs) or of the empirical Fisher (true labels)
    local_hessian         the layer's own Hessian X X^T: of its output error, with every off-diagonal entry

The loss is cross-entropy, the mean over all images given, in eval mode and exact float32 (see `steady`).
Results lie on the module's device. Considered are the weights of Conv2d and Linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..files import atomic_write, file_ref
from ..network.calling import call
from ..network.exact_mode import Batch, Layer, checked_logits, counted, finite, steady, watched, weight_layers
from ..network.row_sampling import sampled_rows
from ..run_folder import Stage
from ..types import FileRef
from .layer_inputs import check_positions, padded, parts, positions_of, squared, strip_columns, unfolded

CHUNK = 1 << 23  # elements of unfolded inputs held at a time, 32 MiB: small beside a training step's activations


def kept_or(
    stage: Stage | None, compute: Callable[[], Mapping[str, Tensor]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The curvature that `stage` has, else that which is computed now, and kept; on the CPU.

    It takes minutes, and the ranking that follows may be interrupted.

    Args:
        stage: whose key says all that the curvature depends on; None: nothing is kept.
        compute: gives it.
        shapes: of its tensors; a stored curvature whose shapes differ is recomputed.
    """
    ref = None if stage is None else stage.result(FileRef)
    if stage is not None and ref is not None:
        found = load_file(stage.run.path / ref.path)
        if {name: tuple(value.shape) for name, value in found.items()} == {name: tuple(shape) for name, shape in shapes.items()}:
            return found
    found = {name: value.cpu().contiguous() for name, value in compute().items()}
    if stage is not None:
        path = stage.folder / "curvature.safetensors"
        atomic_write(path, save(found))
        stage.finish(file_ref(path, stage.run.path))
    return found


def gauss_newton(
    module: nn.Module,
    batches: Sequence[Batch],
    draws: int = 1,
    seed: int = 0,
    *,
    empirical: bool = False,
    chunk: int = CHUNK,
    skip: int = 0,
) -> dict[str, Tensor]:
    """Gauss-Newton diagonal: the mean over images and draws of the squared per-image gradient of a `probing_loss`.

    For softmax and cross-entropy this is unbiased for the Gauss-Newton (= Fisher) diagonal (Martens 2020, section 9); it is
    never negative and ranks far better than differences of the gradient at the same cost. Per-image gradients are formed layer by
    layer from its input and the output's gradient, some images at a time, and never kept.

    Args:
        module: gives logits (N, classes); images must not influence each other.
        batches: calibration images; the labels matter only with `empirical`.
        draws: of the loss's signs; each costs one backward pass.
        seed: of the signs.
        empirical: take the true labels, once (the empirical Fisher: cheaper to rank by, but not a curvature).
        chunk: elements of unfolded inputs held at a time. Bounds memory; the result does not depend on it.
        skip: images before these whose signs are drawn first: a share of the images gets the signs it has among all of them.

    Returns:
        Layer name -> curvature of the weight's shape, >= 0. A layer the forward pass does not use gets zeros.

    Raises:
        InputError: a layer is called twice, is fed something else than one row per image, or has its weight used behind its
            back; no images, a half-precision module, shared weights, or a result that is not finite.
    """
    if draws < 1 or chunk < 1:
        raise ValueError(f"draws {draws} and chunk {chunk} must be positive")
    if skip < 0:
        raise ValueError(f"skip {skip} must not be negative")
    layers = weight_layers(module)
    generators = sign_generators(seed, draws)
    rounds = 1 if empirical else draws
    with steady(module) as place:
        total = {name: torch.zeros_like(layer.weight, requires_grad=False) for name, layer in layers.items()}
        images = counted(batches)
        for inputs, labels in batches:
            leaf = inputs.detach().to(place.device, place.dtype).requires_grad_()
            seen: set[str] = set()

            def record(name: str, layer: Layer, x: Tensor, out: Tensor, seen: set[str] = seen, n: int = len(inputs)) -> None:
                if name in seen:
                    raise InputError(f"layer {name!r} is called twice in one forward pass", expected="one call", do="copy it")
                if not out.requires_grad or x.shape[0] != n:
                    what = f"per-image gradients of layer {name!r} cannot be told apart"
                    raise InputError(what, found=f"{x.shape[0]} rows for {n} images", expected="one row per image")
                seen.add(name)
                version = x._version

                def add(gradient: Tensor) -> None:
                    if x._version != version:
                        raise InputError(
                            f"the input of layer {name!r} is changed in place after use", do="drop inplace=True there"
                        )
                    total[name] += squared(name, layer, x, gradient, chunk)

                out.register_hook(add)  # type: ignore[no-untyped-call]

            with watched(layers, record):
                logits = checked_logits(module(leaf.clone()))  # a clone: networks may normalise their input in place
            _refuse_unseen(layers, logits, seen)
            if skip:
                for generator in generators:
                    torch.randint(0, 2, (skip, logits.shape[1]), generator=generator)
                skip = 0
            for turn in range(rounds):
                if empirical:
                    loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                else:
                    loss = probing_loss(logits, generators[turn])
                # With respect to the images alone: the hooks see every layer, and no weight gradient is computed.
                torch.autograd.grad(loss, leaf, retain_graph=turn + 1 < rounds)
    return finite({name: value / (images * rounds) for name, value in total.items()})


def local_hessian(
    module: nn.Module, batches: Sequence[Batch], layers: Collection[str] | None = None, *, chunk: int = CHUNK
) -> dict[str, Tensor]:
    """The layer-local Hessian X X^T, the mean over images and output positions of each layer's (unfolded) inputs.

    On large feature maps it is the mean over sampled rows, see `network.row_sampling`.

    It is the Hessian (but for the factor 2) of the squared error of the layer's output, the same for every output row (OBC,
    Frantar & Alistarh 2022). Products of float32 chunks are summed in float64; memory is 12 k^2 bytes for each layer asked for.

    Args:
        module: any forward pass; the labels are not used.
        batches: calibration images.
        layers: names; None for all that the forward pass uses.
        chunk: elements of unfolded inputs held at a time.

    Returns:
        Layer name -> (k, k) with k = C_in/groups * kh * kw in the order of `weight.flatten(1)`; (groups, k, k) where groups > 1.

    Raises:
        InputError: a layer asked for is not in the model or is never called; and as `gauss_newton`.
    """
    every = weight_layers(module)
    for name in layers or ():
        if name not in every:
            raise InputError(f"no layer {name!r} in the model", expected="the name of a Conv2d or Linear layer")
    chosen = every if layers is None else {name: every[name] for name in layers}
    sums: dict[str, Tensor] = {}
    columns: dict[str, int] = {}
    turn: dict[str, int] = {}  # batches that a layer has seen

    def record(name: str, layer: Layer, x: Tensor, out: Tensor) -> None:
        seen = turn.get(name, 0)
        turn[name] = seen + 1
        for start, stop in parts(layer, x, out, chunk):
            u = _columns(name, layer, x[start:stop], out[start:stop], seen).permute(1, 2, 0, 3).flatten(2)  # (groups, k, n*L)
            product = (u @ u.transpose(1, 2)).double()
            sums[name] = sums[name].add_(product) if name in sums else product
            columns[name] = columns.get(name, 0) + u.shape[2]

    with steady(module) as place, torch.no_grad(), watched(chosen, record):
        counted(batches)
        for inputs, _ in batches:
            call(module, like(inputs, place))
    for name in layers or ():
        if name not in sums:
            raise InputError(f"layer {name!r} is never called in the forward pass", do="leave it out")
    done = {name: (sums.pop(name) / columns[name]).to(place.dtype) for name in chosen if name in sums}
    return finite({name: h[0] if h.shape[0] == 1 else h for name, h in done.items()})


def _columns(name: str, layer: Layer, x: Tensor, out: Tensor, turn: int) -> Tensor:
    """Returns the unfolded inputs that the Hessian is computed on: (n, groups, k, L)."""
    if not isinstance(layer, nn.Conv2d) or len(rows := sampled_rows(out.shape[2], out.shape[3], turn)) == out.shape[2]:
        return unfolded(layer, x, positions_of(layer, out), name)
    check_positions(name, layer, padded(layer, x), (0, 0), out)
    columns = strip_columns(layer, x, rows)
    return columns.reshape(len(columns), layer.groups, -1, columns.shape[2])


def like(inputs: Any, place: Tensor) -> Any:
    """Network inputs on a weight's device; those that are no whole numbers in its type."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(place.device, place.dtype if t.is_floating_point() else t.dtype), inputs)


def sign_generators(seed: int, draws: int) -> list[torch.Generator]:
    """Returns one generator for each draw of the signs, so that an image's signs do not depend on the size of the batches."""
    return [torch.Generator().manual_seed(seed + 1_000_003 * turn) for turn in range(draws)]


def probing_loss(logits: Tensor, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
    """A random loss, summed over images, whose squared per-image gradients are the Gauss-Newton matrix on average.

    `sum_c s_c sqrt(p_c) (z_c - p.z)` with random signs s, logits z and p held fixed (curvature propagation, Martens, Sutskever &
    Swersky 2012, arXiv 1206.6464). Labels drawn from p average to the same matrix, but where the network is sure nearly every
    draw is the label it expects, whose gradient is nothing; a root of p lets every class speak in every draw. Signs are drawn on
    the CPU, so that the device does not matter.

    Args:
        logits: (N, classes).
        generator: of the signs.
        temperature: p is the softmax of logits / temperature, and the matrix that of the cross-entropy of such logits (but for
            a factor, the temperature squared).
    """
    shares = (logits.detach().double() / temperature).softmax(1)
    if not bool(shares.isfinite().all()):
        raise InputError("the model's outputs are not finite", found="NaN or infinity", do="check weights and images")
    signs = torch.randint(0, 2, shares.shape, generator=generator).to(shares) * 2 - 1
    return ((signs * shares.sqrt()).to(logits) * (logits - (shares.to(logits) * logits).sum(1, keepdim=True))).sum()


def _refuse_unseen(layers: Mapping[str, Layer], logits: Tensor, seen: Collection[str]) -> None:
    """A layer that was never called may still be used: attention reads its projections' weights directly."""
    unseen = [name for name in layers if name not in seen]
    if not unseen:
        return
    weights = [layers[name].weight for name in unseen]
    found = torch.autograd.grad(logits.sum(), weights, retain_graph=True, allow_unused=True)
    for name, gradient in zip(unseen, found, strict=True):
        if gradient is not None:
            what = f"the weight of layer {name!r} is used outside of its own forward pass"
            raise InputError(what, expected="a layer that is called", do="use --score magnitude")
