"""Loads trained networks: a factory for the architecture, a state dict for the weights. Networks are never unpickled."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..data.code_digest import code_digest
from ..data.digits import MEAN as DIGITS_MEAN
from ..data.digits import STD as DIGITS_STD
from ..data.digits import DigitsResNet
from ..data.image_folder import TORCHVISION
from ..data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ..data.user_code import functions_in, own_randomness, user_factory, users_code
from ..errors import InputError, described, importing, install_hint
from ..network.calling import SAME, deviation
from ..network.modes import differing, unusable, unwrapped
from ..network.weights import state_sha256
from ..signature import Crop
from .checkpoint import classes_in, put_state, read_state

SCHEMES = ("digits-resnet", "torchvision:NAME", "timm:NAME", "FILE.py:FACTORY", "package.module:FACTORY")
CLASSES = 1000  # of a network that is only looked at
SHOWN = 5  # functions of a file that a message names
CLASS_COUNT = "num_classes"  # the argument that a factory may have
Statistics = tuple[float, ...]


@dataclass(frozen=True)
class LoadedModel:
    """A loaded network with its preprocessing, where it is known."""

    module: nn.Module  # eval mode, CPU, float32
    name: str
    sha256: str  # of the state dict
    mean: Statistics | None  # per channel, of pixels in [0, 1]; None: not known
    std: Statistics | None
    code: str = ""  # digest of the user's code, or the version of the package that makes the network
    notes: tuple[str, ...] = ()  # how the checkpoint was read, where that was a choice


def load_model(
    spec: str,
    weights: Path | None,
    *,
    classes: int,
    image_shape: tuple[int, int, int],
    checkpoint_key: str | None = None,
) -> LoadedModel:
    """Returns the network that `spec` names with the weights of a file, checked on one black image.

    Args:
        spec: one of `SCHEMES`. A factory takes no argument, or `num_classes`. `MEAN` and `STD` in its file are used.
        weights: a state dict as `.safetensors`, `.pt` or `.pth`. Required except for `digits-resnet`, which without
            it has its initial weights: the caller trains it.
        classes: how many classes the data has.
        image_shape: of the data, (C, H, W).
        checkpoint_key: name of the state dict in the file, see `read_state`.

    Raises:
        InputError: the model or the weights cannot be used, or do not fit each other or the data.
        UnavailableError: timm is not installed.
    """
    if weights is None and spec != "digits-resnet":
        _require_known(spec)
        do = "give its trained state dict with --weights"
        raise InputError(f"model {spec}", found="no weights", expected="a trained network", do=do)
    notes: list[str] = []
    state = None if weights is None else read_state(weights, notes.append, checkpoint_key)
    channels = image_shape[0]
    with own_randomness():
        loaded = _made(spec, classes, channels)
    module, taken = unwrapped(loaded.module)
    notes += [f"model: {name} was unwrapped" for name in taken]
    module = _ready(spec, module)
    if state is not None and weights is not None:
        put_state(module, state, weights.name, classes=classes, note=notes.append)
    _probe(spec, module, classes, image_shape)
    fits = loaded.mean is not None and loaded.std is not None and len(loaded.mean) == len(loaded.std) == channels
    mean, std = (loaded.mean, loaded.std) if fits else (None, None)
    return LoadedModel(module, loaded.name, state_sha256(module), mean, std, loaded.code, tuple(notes))


def initial_network(
    spec: str,
    weights: Path | None,
    *,
    channels: int = 3,
    checkpoint_key: str | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> nn.Module:
    """Returns the network that `spec` names with initial weights, or those of a file: CPU, float32, eval mode, of any task.

    It has as many classes as the file's network, 1,000 without a file.

    Args:
        spec: one of `SCHEMES`.
        weights: see `load_model`.
        channels: of an input.
        checkpoint_key: name of the state dict in the file, see `read_state`.
        told: is called with what was chosen or ignored in the file.

    Raises:
        InputError: the network cannot be made, or the weights are not its own.
        UnavailableError: timm is not installed.
    """

    def made(classes: int) -> nn.Module:
        with own_randomness():
            return _ready(spec, _made(spec, classes, channels).module)

    module = made(CLASSES)
    if weights is None:
        return module
    state = read_state(weights, told, checkpoint_key)
    classes = classes_in(state, unwrapped(module)[0], CLASSES)
    module = module if classes == CLASSES else made(classes)
    put_state(unwrapped(module)[0], state, weights.name, classes=classes)
    return module


def example_shape(spec: str, image_size: int | None) -> tuple[int, int, int]:
    """Returns the shape (C, H, W) of one input of the model that `spec` names: its own size, else 224; digits are 8x8 and grey.

    Raises:
        InputError: the file of a factory cannot be imported.
    """
    if spec == "digits-resnet":
        return 1, image_size or 8, image_size or 8
    crop = None if image_size is not None else evaluation_crop(spec)
    size = image_size or (224 if crop is None else crop.size)
    return 3, size, size


def evaluation_crop(spec: str) -> Crop | None:
    """Returns how the model that `spec` names is evaluated: resizing and cropping. None where that is not known.

    torchvision: the transforms of its default weights. timm: its configuration. A factory: `IMAGE_SIZE` in its file, resized in
    ImageNet's proportion. Unknown names are left for `load_model` to refuse.

    Raises:
        InputError: the file of a factory cannot be imported.
    """
    scheme, _, rest = spec.partition(":")
    if scheme == "torchvision":
        with importing("torchvision", TORCHVISION):
            from torchvision import models
        if rest in models.list_models(module=models):
            preset = models.get_model_weights(rest).DEFAULT.transforms()
            return Crop(preset.crop_size[0], preset.resize_size[0], preset.interpolation.value)
    if scheme == "timm":
        with importing("timm", install_hint("timm")):
            import timm
            from torchvision.transforms import InterpolationMode
        with contextlib.suppress(RuntimeError):  # no such model
            facts = timm.get_pretrained_cfg(rest)
            if facts is not None:
                known = {mode.value for mode in InterpolationMode}
                method = facts.interpolation if facts.interpolation in known else Crop.interpolation
                return Crop(facts.input_size[-1], int(facts.input_size[-1] / facts.crop_pct), method)
    elif rest and scheme != "torchvision":
        size = getattr(user_factory(spec, "model").module, "IMAGE_SIZE", None)
        return resized(Crop(), size) if isinstance(size, int) else None
    return None


def resized(crop: Crop, size: int) -> Crop:
    """Returns the same crop for another image size."""
    return replace(crop, size=size, resize=round(size * crop.resize / crop.size))


def _ready(spec: str, module: nn.Module) -> nn.Module:
    """The network on the CPU, in float32 and eval mode."""
    found, do = unusable(module)
    if not found:
        try:
            return module.to("cpu", torch.float32).eval()
        except Exception as error:  # its own `train`, or modules of other libraries
            found, do = described(error), "make sure that .float().eval() works on it"
    raise InputError(f"model {spec}", found=found, expected="a torch.nn.Module with values", do=do)


def _probe(spec: str, module: nn.Module, classes: int, image_shape: tuple[int, int, int]) -> None:
    """Runs one black image through the network and checks that it returns one logit per class."""
    shape = (1, *image_shape)
    try:
        with torch.no_grad():
            output = module(torch.zeros(shape))
    except Exception as error:
        found = described(error)
        do = "give images of the size and channels the network was made for"
        raise InputError(f"model {spec} fails on an input {shape}", found=found, expected="logits", do=do) from error
    if not isinstance(output, torch.Tensor):
        found = f"a {type(output).__name__}"
        raise InputError(f"model {spec}: its output", found=found, expected=f"a tensor (1, {classes})", do="return logits alone")
    if tuple(output.shape) != (1, classes):
        found, expected = f"output {tuple(output.shape)}", f"(1, {classes}): one logit for each class of the data"
        do = "give the data the network was trained on"
        if tuple(output.shape) == (1, 1) and classes == 2:
            do = "wrap it: return torch.cat([-y / 2, y / 2], 1), which is two logits with the same probabilities"
        raise InputError(f"model {spec}: classes do not match", found=found, expected=expected, do=do)
    if not bool(torch.isfinite(output).all()):
        do = "check the weights, BatchNorm's variances first"
        raise InputError(f"model {spec}: its output", found="NaN or infinity", expected="finite logits", do=do)
    _require_deterministic(spec, module, shape)


def _require_deterministic(spec: str, module: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuses a network that in eval mode draws random numbers, or takes its BatchNorm statistics from the batch."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), own_randomness(1):
        one, other = module(images), module(images)
    if deviation(one, other, one) > SAME:
        do = "pass training=self.training to functional dropout"
        where = differing(module, images) or "its forward"
        found = f"two answers for the same image that differ in eval mode, first in {where}"
        raise InputError(f"model {spec}: its output", found=found, expected="one answer", do=do)
    without = [n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is None]
    if without:
        found = f"BatchNorm without running statistics ({without[0]})"
        do = "make it with track_running_stats=True, so that an image's answer does not depend on the others of its batch"
        raise InputError(f"model {spec}", found=found, expected="fixed statistics in eval mode", do=do)


def _made(spec: str, classes: int, channels: int) -> LoadedModel:
    """The network that `spec` names, with initial weights."""
    scheme, _, rest = spec.partition(":")
    if spec == "digits-resnet":
        return LoadedModel(DigitsResNet(), spec, "", DIGITS_MEAN, DIGITS_STD)
    _require_known(spec)
    if scheme == "torchvision":
        return _from_torchvision(spec, rest, classes)
    if scheme == "timm":
        return _from_timm(spec, rest, classes, channels)
    return _from_factory(spec, classes, channels)


def _require_known(spec: str) -> None:
    """Raises `InputError` for a network that does not exist, with the one that was probably meant."""
    scheme, _, rest = spec.partition(":")
    if not rest:
        near = functions_in(spec, CLASS_COUNT) if spec.endswith(".py") else ()
        do = f"name one of its functions: {', '.join(f'{spec}:{name}' for name in near[:SHOWN])}" if near else "see --help"
        raise InputError("unknown model", found=repr(spec), expected="one of " + ", ".join(SCHEMES), do=do)
    if scheme == "torchvision":
        with importing("torchvision", TORCHVISION):
            import torchvision
        names = torchvision.models.list_models(module=torchvision.models)
        if rest not in names:
            raise _unknown(spec, rest, names)
    elif scheme == "timm":
        with importing("timm", install_hint("timm")):
            import timm
        if not timm.is_model(rest):
            raise _unknown(spec, rest, timm.list_models())


def _from_torchvision(spec: str, name: str, classes: int) -> LoadedModel:
    import torchvision

    try:
        module: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    except Exception as error:
        raise InputError(f"model {spec} cannot be made", found=described(error), do="use another") from error
    return LoadedModel(module, spec, "", IMAGENET_MEAN, IMAGENET_STD, f"torchvision {torchvision.__version__}")


def _from_timm(spec: str, name: str, classes: int, channels: int) -> LoadedModel:
    import timm

    try:
        module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    except Exception as error:
        raise InputError(f"model {spec} cannot be made", found=described(error), do="use another") from error
    facts: Any = module.default_cfg
    mean, std = (tuple(float(v) for v in facts[key]) if facts.get(key) else None for key in ("mean", "std"))
    return LoadedModel(module, spec, "", mean, std, f"timm {timm.__version__}")


def _from_factory(spec: str, classes: int, channels: int) -> LoadedModel:
    factory = user_factory(spec, "model")
    folder = Path(spec.rpartition(":")[0]).expanduser().resolve().parent
    expected = "a function that needs no argument, or num_classes"
    with users_code(folder, f"model {spec}: the factory failed", expected=expected, do="call it on its own"):
        takes = inspect.signature(factory.function).parameters
        module = factory.function(**({CLASS_COUNT: classes} if CLASS_COUNT in takes else {}))
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        found = f"a {type(module).__name__}"
        raise InputError(
            f"model {spec}", found=found, expected="a torch.nn.Module in Python", do="return the network from the factory"
        )
    lazy = [name for name, parameter in module.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise InputError(f"model {spec}", found=f"{lazy[0]} without a shape", expected="no lazy layers", do="give its sizes")
    mean, std = (_statistics(spec, factory.module, name, channels) for name in ("MEAN", "STD"))
    return LoadedModel(module, factory.name, "", mean, std, code_digest(factory.module))


def _statistics(spec: str, module: ModuleType, name: str, channels: int) -> Statistics | None:
    value = getattr(module, name, None)
    if value is None:
        return None
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        numbers = ()
    low, high = (1e-6, 1e6) if name == "STD" else (-1e6, 1e6)
    if len(numbers) != channels or not all(low <= number <= high for number in numbers):
        expected = f"{channels} numbers from {low:g} to {high:g}, one per channel of the images"
        do = "correct it in the model's file, or give the data the network was trained on"
        raise InputError(f"model {spec}: {name}", found=repr(value), expected=expected, do=do)
    return numbers


def _unknown(spec: str, name: str, names: list[str]) -> InputError:
    near = difflib.get_close_matches(name, names, 1)
    do = f"did you mean {near[0]!r}?" if near else "see the package's list of models"
    return InputError(f"model {spec}", found=f"no model {name!r}", expected=f"one of {len(names)} names", do=do)
