"""State dicts: kept in a stage's folder, read back, and their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..files import atomic_write, file_ref
from ..run_folder import Stage
from ..types import FileRef


def weights_file(folder: Path) -> Path:
    """Where a stage keeps a network's state dict."""
    return folder / "weights.safetensors"


def save_weights(stage: Stage, module: nn.Module) -> FileRef:
    """Keep the network's state dict in the stage's folder."""
    path = weights_file(stage.folder)
    atomic_write(path, save({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}))
    return file_ref(path, stage.run.path)


def load_weights(root: Path, ref: FileRef, module: nn.Module) -> None:
    """Give the network the weights of a file under the run folder `root`, in eval mode."""
    module.load_state_dict(load_file(root / ref.path))
    module.eval()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, independent of order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        # as bytes, since numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_sha256(module: nn.Module) -> str:
    """`digest_of` a module's state dict."""
    return digest_of(module.state_dict())
