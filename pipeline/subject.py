"""Model and data -> Subject: what is to be compressed, loaded and checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from .accuracy import cost_of
from .config import Config
from .data import DataSet, load_data
from .errors import InputError, UnavailableError
from .models import LoadedModel, load_model
from .preprocess import check_augment
from .store import Stage, atomic_write, file_ref
from .types import FileRef, Preprocess, Subject

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_MODEL = "digits-resnet"  # the embedded network: trained on the spot when no weights are given


@dataclass(frozen=True)
class Loaded:
    """A subject with its live objects."""

    subject: Subject
    module: nn.Module  # the user's dense network, eval mode
    data: DataSet
    untrained: bool  # the embedded network without weights: it has to be trained first


def load_subject(config: Config) -> Loaded:
    """Load model and data, and settle how images become inputs.

    Raises:
        InputError: see `data.load_data` and `models.load_model`; or mean and std do not fit the images.
    """
    data = load_data(config.data, seed=config.seed, image_size=config.image_size)
    shape = data.info.image_shape
    model = load_model(config.model, config.weights, classes=len(data.info.classes), image_shape=shape)
    preprocess = _preprocess(config, model, shape)
    subject = Subject(model.name, model.sha256, data.info, preprocess, cost_of(model.module, shape))
    return Loaded(subject, model.module, data, untrained=config.model == DIGITS_MODEL and config.weights is None)


def accelerator(config: Config) -> str:
    """The torch device to compute on.

    Raises:
        UnavailableError: CUDA was asked for and is not here.
    """
    if config.accelerator == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if config.accelerator == "cuda":
        raise UnavailableError("--accelerator cuda", found="no CUDA device", do="use --accelerator auto")
    return "cpu"


def fast_bfloat16(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device multiplies bfloat16 faster than float32: training then runs under autocast, curvature never does."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: not known, so the exact way
        return False
    flags = next((line.split(":", 1)[-1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _preprocess(config: Config, model: LoadedModel, shape: tuple[int, int, int]) -> Preprocess:
    mean, std = config.mean or model.mean, config.std or model.std
    if mean is None or std is None:
        mean, std = (mean or IMAGENET_MEAN, std or IMAGENET_STD) if shape[0] == 3 else (mean or (0.5,), std or (0.5,))
    for name, values in (("--mean", mean), ("--std", std)):
        if len(values) != shape[0]:
            raise InputError(name, found=f"{len(values)} values", expected=f"one for each of the {shape[0]} image channels")
    augment = config.augment or ("shift" if config.data == "digits" else "crop-flip")
    check_augment(augment)
    return Preprocess(tuple(mean), tuple(std), augment)


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
