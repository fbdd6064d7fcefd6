"""What the ONNX exporter need not do twice in a process."""

from __future__ import annotations

import functools
import hashlib
import importlib
import weakref
from collections.abc import Callable
from itertools import chain

import onnx
import torch
from torch import nn

from ...pipeline.signature import Signature

LARGEST_BYTES = 100_000_000  # graphs beyond are not kept

_kept: dict[int, tuple[weakref.ref[nn.Module], str, onnx.ModelProto]] = {}


def collect_operators_once() -> None:
    """Makes the exporter parse its library of operators once a process; it does so for each export, for about a second.

    The exporter has no switch for it. Where a version keeps its library elsewhere, nothing is changed.
    """
    try:
        library = importlib.import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
        collect = library.get_torchlib_ops
    except (ImportError, AttributeError):
        return
    if not hasattr(collect, "cache_info"):
        library.get_torchlib_ops = functools.cache(collect)


def exported_once(module: nn.Module, signature: Signature, export: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    """Returns a graph of a module, or a copy of the last one while the module, its tensors and the signature are the same."""
    state = hashlib.blake2b(f"{signature!r}{module!r}".encode())
    tensors = dict(chain(module.named_parameters(), module.named_buffers()))
    if any(t.layout is not torch.strided or t.is_meta for t in tensors.values()):
        return export()
    if sum(t.nbytes for t in tensors.values()) > LARGEST_BYTES:
        return export()
    for name, tensor in tensors.items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    key = id(module)
    found = _kept.get(key)
    if found is None or found[0]() is not module or found[1] != state.hexdigest():
        found = weakref.ref(module, lambda _: _kept.pop(key, None)), state.hexdigest(), export()
        _kept[key] = found
    copied = onnx.ModelProto()
    copied.CopyFrom(found[2])
    return copied
