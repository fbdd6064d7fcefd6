"""Reads state dicts from checkpoints as training scripts write them. Nothing is unpickled but tensors."""

from __future__ import annotations

import argparse
import codecs
import importlib
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from ..errors import InputError

# keys under which training scripts put the state dict; averaged weights first, which are what such scripts evaluate
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
MOST_WRAPPED, MOST_NAMED = 5, 8  # dicts in dicts, and their names in a message
COUNTERS = ("total_ops", "total_params")  # buffers that thop adds to every module
_MULTIARRAY: Any = importlib.import_module("numpy._core.multiarray")
HARMLESS: list[Any] = [  # types that checkpoints often contain; constructing one runs no code from the file
    *(argparse.Namespace, pathlib.PosixPath, codecs.encode),
    *(np.dtype, np.ndarray, _MULTIARRAY.scalar, _MULTIARRAY._reconstruct),
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "uint8", "float32", "float64", "str")),
    (_MULTIARRAY.scalar, "numpy.core.multiarray.scalar"),  # its name before numpy 2
    (_MULTIARRAY._reconstruct, "numpy.core.multiarray._reconstruct"),
]
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name


def read_state(path: Path, note: Callable[[str], None] = lambda text: None, key: str | None = None) -> dict[str, torch.Tensor]:
    """Returns the state dict in a `.safetensors` file or one of `torch.save`, without wrappers and prefixes of training scripts.

    Args:
        path: the file.
        note: called with a sentence where the file has several state dicts and none was asked for.
        key: the name of the one to take; None: the first of `WRAPPERS` that is there.

    Raises:
        InputError: no such file, another format, a pickle of code, or not a state dict; none of the name asked for.
    """
    what, do = f"weights {path.name}", "save it with torch.save(model.state_dict(), FILE)"
    if not path.is_file():
        raise InputError(f"weights {path}", found="no such file", expected="a state dict", do="check the path")
    if program := _not_a_state(path):
        raise InputError(what, found=program, expected="a state dict", do=f"{do} of the network it was made from")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # remarks on how the file was written
            if path.suffix == ".safetensors":
                content: Any = safetensors.torch.load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a pickle of code ({named[1]})" if named else "a pickle that torch does not load as plain tensors"
        raise InputError(what, found=found, expected="a state dict, which is plain tensors", do=do) from error
    except MemoryError:
        raise
    except Exception as error:  # torch's readers assert and unpack what damaged files do not have, and share no exception
        found = f"a file that cannot be read ({type(error).__name__}: {str(error)[:200]})"
        raise InputError(what, found=found, expected="a state dict", do=do) from error
    wanted, names = key, set[str]()
    for _ in range(MOST_WRAPPED):  # a dict can hold itself
        inner = {k: v for k, v in content.items() if isinstance(v, Mapping)} if isinstance(content, Mapping) else {}
        names |= set(map(str, inner))
        if wanted is not None and wanted in inner:
            content, wanted = inner[wanted], None
            continue
        keys = [k for k in WRAPPERS if k in inner]
        if len(keys) > 1 and wanted is None:
            others = ", ".join(map(repr, keys[1:]))
            note(f"weights: {keys[0]!r} of the checkpoint was used, not {others}; --checkpoint-key names another")
        content = inner[keys[0]] if keys else content
    if wanted is not None:
        found = ", ".join(map(repr, sorted(names)[:MOST_NAMED])) or "no state dict under a name"
        raise InputError(f"{what}: --checkpoint-key {key}", found=found, expected="the name of a state dict in the file")
    if not isinstance(content, Mapping) or not content:
        found = "an empty one" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(what, found=found, expected="a state dict", do=do)
    strange = [k for k, v in content.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if strange:
        found = f"{strange[0]!r} with a {type(content[strange[0]]).__name__}"
        raise InputError(what, found=found, expected="a state dict: names with tensors", do=do)
    state = {name: tensor for name, tensor in content.items() if name.rpartition(".")[2] not in COUNTERS}
    for name, tensor in state.items():
        if kind := _unusual(tensor):
            raise InputError(what, found=f"{name}, {kind} tensor", expected="dense tensors of real numbers", do=do)
    state = _masked(state, note)
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _not_a_state(path: Path) -> str:
    """Returns why a file cannot be a state dict: the kind of program in it (TorchScript, torch.export), or that it is damaged."""
    try:
        if not zipfile.is_zipfile(path):
            return ""
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
            for entry in archive.infolist():
                if entry.CRC:  # 0: saved without checksums; torch.load itself checks none
                    with archive.open(entry) as content:
                        while content.read(1 << 24):
                            pass
    except zipfile.BadZipFile:
        return "a damaged file (a checksum in it is wrong)"
    except MemoryError:
        raise
    except Exception:  # of a decompressor; not ignored: torch.load then raises its own
        return ""
    if "constants.pkl" in names:
        return "a TorchScript program"
    return "a program of torch.export" if "archive_format" in names or "serialized_exported_program.json" in names else ""


def _unusual(tensor: torch.Tensor) -> str:
    """Returns "a sparse", "a quantised", "a meta" or "a complex"; "" for a dense real tensor."""
    kinds = {
        "a sparse": tensor.layout is not torch.strided,
        "a quantised": tensor.is_quantized,
        "a meta": tensor.is_meta,
        "a complex": tensor.is_complex(),
    }
    return next((kind for kind, holds in kinds.items() if holds), "")


def _masked(state: Mapping[str, torch.Tensor], note: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """Returns the state dict with the masks of `torch.nn.utils.prune` applied to their weights."""
    found = dict(state)
    for name in [name for name in state if name.endswith("_orig")]:
        plain = name.removesuffix("_orig")
        mask = state.get(f"{plain}_mask")
        if mask is not None and plain not in state and mask.shape == state[name].shape:
            found[plain] = found.pop(name) * found.pop(f"{plain}_mask")
            note(f"weights: {plain} was pruned in training: its mask was applied")
    return found


def put_state(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    name: str,
    *,
    classes: int,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Loads `state` into `module`, cast to its types; `name` and `classes` are for messages.

    `note` is called with a sentence where a prefix of the names was removed.

    Raises:
        InputError: names or shapes differ, or a value is NaN or infinite. The module is then unchanged, or not to be used.
    """
    own = module.state_dict()
    state = _without_prefix(state, own, note)
    # BatchNorm's count of batches is absent from old files and does nothing in inference
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        found = ", ".join(f"{len(keys)} {word} keys (first: {keys[0]})" for word, keys in lists if keys)
        expected = f"the {len(own)} keys of the model's state dict"
        raise InputError(f"weights {name}: of another model", found=found, expected=expected, do="check --model and --weights")
    if integers := [k for k, v in state.items() if own[k].is_floating_point() and not v.is_floating_point()]:
        found = f"{integers[0]} of {str(state[integers[0]].dtype).removeprefix('torch.')}"
        raise InputError(f"weights {name}", found=found, expected="floating-point numbers", do="save the float network's weights")
    mismatched = [k for k in own if k in state and state[k].shape != own[k].shape]
    if mismatched:
        key = mismatched[0]
        found, expected = f"{key} of shape {tuple(state[key].shape)}", f"{tuple(own[key].shape)}"
        heads = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)][-1:]
        if heads and all(k in (f"{heads[0]}.weight", f"{heads[0]}.bias") for k in mismatched):
            do = f"did you mean data with {len(state[key])} classes? This has {classes}; give the data the network was trained on"
            raise InputError(f"weights {name}: classes do not match", found=found, expected=expected, do=do)
        found += f" ({len(mismatched)} keys of another shape)"
        raise InputError(f"weights {name}: of another model", found=found, expected=expected, do="check --model and --weights")
    module.load_state_dict(dict(state), strict=False)
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            found = f"NaN or infinity in {key} ({bad} of {tensor.numel()} values)"
            raise InputError(f"weights {name}", found=found, expected="finite numbers", do="use an earlier checkpoint")


def classes_in(state: Mapping[str, torch.Tensor], module: nn.Module, classes: int) -> int:
    """How many classes the network of a state dict has, told by where it has other sizes than `module`, which has `classes`."""
    own = module.state_dict()
    given = _without_prefix(state, own, lambda text: None)
    pairs = [(given[name].shape, tensor.shape) for name, tensor in own.items() if name in given]
    others = [(there, here) for there, here in pairs if there and there != here and here[:1] == (classes,)]
    counts = {there[0] for there, here in others if there[1:] == here[1:]}
    return int(counts.pop()) if len(counts) == 1 else classes


def _without_prefix(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], note: Callable[[str], None]
) -> Mapping[str, torch.Tensor]:
    """Returns the entries below the one prefix, such as Lightning's `model.`, that has all of the model's names; else all."""
    first = next(iter(own), "")
    prefixes = {name.removesuffix(first) for name in state if first and name.endswith(f".{first}")}
    fitting = [p for p in prefixes if all(p + name in state for name in own if not name.endswith("num_batches_tracked"))]
    if len(fitting) != 1 or first in state:
        return state
    (prefix,) = fitting
    others = [name for name in state if not name.startswith(prefix)]
    ignored = f"; {len(others)} other entries ignored, first {others[0]}" if others else ""
    note(f"weights: the prefix {prefix!r} was removed{ignored}")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
