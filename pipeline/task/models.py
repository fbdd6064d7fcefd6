"""Loads trained networks: a factory for the architecture, a state dict for the weights. Networks are never unpickled."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from ..data.digits import MEAN as DIGITS_MEAN
from ..data.digits import STD as DIGITS_STD
from ..data.digits import DigitsResNet
from ..data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ..data.user_code import code_digest, importable, own_randomness, user_factory
from ..errors import InputError, UnavailableError
from ..network.weights import of_one_part, state_sha256
from ..types import Crop

SCHEMES = ("digits-resnet", "torchvision:NAME", "timm:NAME", "FILE.py:FACTORY", "package.module:FACTORY")
CLASSES = 1000  # of a network that is only looked at
# keys under which training scripts put the state dict; averaged weights first, which are what such scripts evaluate
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
MOST_WRAPPED = 5
COUNTERS = ("total_ops", "total_params")  # buffers that thop adds to every module
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
UNREADABLE = (OSError, EOFError, ValueError, LookupError, RuntimeError, AttributeError, TypeError, pickle.UnpicklingError)

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


def load_model(spec: str, weights: Path | None, *, classes: int, image_shape: tuple[int, int, int]) -> LoadedModel:
    """Returns the network that `spec` names with the weights of a file, checked on one black image.

    Args:
        spec: one of `SCHEMES`. A factory takes no argument, or `num_classes`. `MEAN` and `STD` in its file are used.
        weights: a state dict as `.safetensors`, `.pt` or `.pth`. Required except for `digits-resnet`, which without
            it has its initial weights: the caller trains it.
        classes: how many classes the data has.
        image_shape: of the data, (C, H, W).

    Raises:
        InputError: the model or the weights cannot be used, or do not fit each other or the data.
        UnavailableError: timm is not installed.
    """
    if weights is None and spec != "digits-resnet":
        do = "give its trained state dict with --weights"
        raise InputError(f"model {spec}", found="no weights", expected="a trained network", do=do)
    state = None if weights is None else read_state(weights)
    channels = image_shape[0]
    with own_randomness():
        loaded = _made(spec, classes, channels)
    module = loaded.module.to("cpu", torch.float32).eval()
    if state is not None and weights is not None:
        put_state(module, state, weights.name, classes=classes)
    _probe(spec, module, classes, image_shape)
    fits = loaded.mean is not None and loaded.std is not None and len(loaded.mean) == len(loaded.std) == channels
    mean, std = (loaded.mean, loaded.std) if fits else (None, None)
    return LoadedModel(module, loaded.name, state_sha256(module), mean, std, loaded.code)


def initial_network(spec: str, weights: Path | None, *, channels: int = 3) -> nn.Module:
    """Returns the network that `spec` names with initial weights, or those of a file: CPU, float32, eval mode, of any task.

    Raises:
        InputError: the network cannot be made, or the weights are not its own.
        UnavailableError: timm is not installed.
    """
    with own_randomness():
        module = _made(spec, CLASSES, channels).module.to("cpu", torch.float32).eval()
    if weights is not None:
        put_state(module, read_state(weights), weights.name, classes=CLASSES)
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
    if scheme == "torchvision" and rest in torchvision.models.list_models(module=torchvision.models):
        preset = torchvision.models.get_model_weights(rest).DEFAULT.transforms()
        return Crop(preset.crop_size[0], preset.resize_size[0], preset.interpolation.value)
    if scheme == "timm":
        with contextlib.suppress(ImportError, RuntimeError):  # RuntimeError: no such model
            import timm

            facts = timm.get_pretrained_cfg(rest)
            if facts is not None:
                known = {mode.value for mode in torchvision.transforms.InterpolationMode}
                method = facts.interpolation if facts.interpolation in known else Crop.interpolation
                return Crop(facts.input_size[-1], int(facts.input_size[-1] / facts.crop_pct), method)
    elif rest and scheme != "torchvision":
        size = getattr(user_factory(spec, "model").module, "IMAGE_SIZE", None)
        return resized(Crop(), size) if isinstance(size, int) else None
    return None


def resized(crop: Crop, size: int) -> Crop:
    """Returns the same crop for another image size."""
    return replace(crop, size=size, resize=round(size * crop.resize / crop.size))


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Returns the state dict in a `.safetensors`, `.pt` or `.pth` file, without wrappers and prefixes of training scripts.

    Raises:
        InputError: no such file, another format, a pickle of code, or not a state dict.
    """
    what, do = f"weights {path.name}", "save it with torch.save(model.state_dict(), FILE)"
    if not path.is_file():
        raise InputError(f"weights {path}", found="no such file", expected="a state dict", do="check the path")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise InputError(what, found=f"a {path.suffix or 'nameless'} file", expected=".safetensors, .pt or .pth", do=do)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on how the file was written
            if path.suffix == ".safetensors":
                content: Any = safetensors.torch.load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a pickle of code ({named[1]})" if named else "a pickle that torch does not load as plain tensors"
        raise InputError(what, found=found, expected="a state dict, which is plain tensors", do=do) from error
    except (*UNREADABLE, safetensors.SafetensorError) as error:
        found = f"a file that cannot be read ({type(error).__name__}: {str(error)[:200]})"
        raise InputError(what, found=found, expected="a state dict", do=do) from error
    for _ in range(MOST_WRAPPED):  # a dict can hold itself
        key = next((k for k in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(k), Mapping)), None)
        content = content if key is None else content[key]
    if not isinstance(content, Mapping) or not content:
        found = "an empty one" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(what, found=found, expected="a state dict", do=do)
    strange = [k for k, v in content.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if strange:
        found = f"{strange[0]!r} with a {type(content[strange[0]]).__name__}"
        raise InputError(what, found=found, expected="a state dict: names with tensors", do=do)
    state = {name: tensor for name, tensor in content.items() if name.rpartition(".")[2] not in COUNTERS}
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def put_state(module: nn.Module, state: Mapping[str, torch.Tensor], name: str, *, classes: int) -> None:
    """Loads `state` into `module`, cast to its types; `name` and `classes` are for messages.

    Raises:
        InputError: names or shapes differ, or a value is NaN or infinite. The module is then unchanged, or not to be used.
    """
    own = module.state_dict()
    state = of_one_part(state, own)
    # BatchNorm's count of batches is absent from old files and does nothing in inference
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        found = ", ".join(f"{len(keys)} {word} keys (first: {keys[0]})" for word, keys in lists if keys)
        expected = f"the {len(own)} keys of the model's state dict"
        raise InputError(f"weights {name}: of another model", found=found, expected=expected, do="check --model and --weights")
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


def _probe(spec: str, module: nn.Module, classes: int, image_shape: tuple[int, int, int]) -> None:
    """Runs one black image through the network and checks that it returns one logit per class."""
    shape = (1, *image_shape)
    try:
        with torch.no_grad():
            output = module(torch.zeros(shape))
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
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
    _refuse_random(spec, module, shape)


def _refuse_random(spec: str, module: nn.Module, shape: tuple[int, ...]) -> None:
    """Two answers for the same image that differ, as with a dropout that is always on, can be compared with nothing."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), own_randomness(1):
        one, other = module(images), module(images)
    if not torch.equal(one, other) and not torch.allclose(one, other, rtol=1e-3, atol=1e-5):
        do = "pass training=self.training to functional dropout"
        found = "two answers for the same image that differ in eval mode"
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
    if not rest:
        raise InputError("unknown model", found=repr(spec), expected="one of " + ", ".join(SCHEMES), do="see --help")
    if scheme == "torchvision":
        version = f"torchvision {torchvision.__version__}"
        return LoadedModel(_from_torchvision(spec, rest, classes), spec, "", IMAGENET_MEAN, IMAGENET_STD, version)
    if scheme == "timm":
        return _from_timm(spec, rest, classes, channels)
    return _from_factory(spec, classes, channels)


def _from_torchvision(spec: str, name: str, classes: int) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise _unknown(spec, name, names)
    try:
        module: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    except Exception as error:
        raise InputError(f"model {spec} cannot be made", found=f"{type(error).__name__}: {error}", do="use another") from error
    return module


def _from_timm(spec: str, name: str, classes: int, channels: int) -> LoadedModel:
    try:
        import timm
    except ImportError as error:
        do = "install it with: pip install 'edge-compress[timm]'"
        raise UnavailableError(f"model {spec}", found=f"no timm ({error})", expected="the package timm", do=do) from error
    if not timm.is_model(name):
        raise _unknown(spec, name, timm.list_models())
    try:
        module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    except Exception as error:
        raise InputError(f"model {spec} cannot be made", found=f"{type(error).__name__}: {error}", do="use another") from error
    facts: Any = module.default_cfg
    mean, std = (tuple(float(v) for v in facts[key]) if facts.get(key) else None for key in ("mean", "std"))
    return LoadedModel(module, spec, "", mean, std, f"timm {timm.__version__}")


def _from_factory(spec: str, classes: int, channels: int) -> LoadedModel:
    factory = user_factory(spec, "model")
    try:
        takes = inspect.signature(factory.function).parameters
        folder = Path(spec.rpartition(":")[0]).expanduser().resolve().parent
        with importable(folder):
            module = factory.function(**({"num_classes": classes} if "num_classes" in takes else {}))
    except (Exception, SystemExit) as error:
        found = f"{type(error).__name__}: {error}"
        expected = "a function that needs no argument, or num_classes"
        raise InputError(f"model {spec}: the factory failed", found=found, expected=expected, do="call it on its own") from error
    if not isinstance(module, nn.Module):
        found = f"a {type(module).__name__}"
        raise InputError(f"model {spec}", found=found, expected="a torch.nn.Module", do="return the network from the factory")
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
    if len(numbers) != channels or (name == "STD" and min(numbers) <= 0):
        expected = f"{channels} {'positive ' if name == 'STD' else ''}numbers, one per channel of the images"
        do = "correct it in the model's file, or give the data the network was trained on"
        raise InputError(f"model {spec}: {name}", found=repr(value), expected=expected, do=do)
    return numbers


def _unknown(spec: str, name: str, names: list[str]) -> InputError:
    near = difflib.get_close_matches(name, names, 1)
    do = f"did you mean {near[0]!r}?" if near else "see the package's list of models"
    return InputError(f"model {spec}", found=f"no model {name!r}", expected=f"one of {len(names)} names", do=do)
