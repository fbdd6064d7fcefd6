"""Drafts a recipe from what `init` is given: model() and datasets() filled in where --model, --weights and --data say how."""

from __future__ import annotations

import ast
import os
from contextlib import suppress
from dataclasses import dataclass
from json import dumps
from pathlib import Path

from ..errors import InputError

_HEAD = '''"""What edge-compress compresses: see docs/any-task.md. `edge-compress inspect --recipe {name}` tries it."""

'''
_TAIL = """

# def outputs(raw):  # what of the forward result is deployed; default: all tensors of it
#     return raw["logits"]


# def loss(outputs, target):  # default: the distance of every output to the dense network's
#     return torch.nn.functional.cross_entropy(outputs, target)


# def metric():  # an object with update(outputs, target), compute(), reset(); torchmetrics fits. Default: agreement with dense
#     return torchmetrics.classification.MulticlassAccuracy(10)


# def augment(inputs, target):  # for fine-tuning; default: none
#     return inputs, target
"""
_UNKNOWN_MODEL = '''

def model() -> nn.Module:
    """The trained network in eval mode. Replace this one by yours, and load its weights."""
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3, padding=1)).eval()
'''
_UNKNOWN_DATA = '''

def datasets() -> dict:
    """Datasets of (inputs, target), one sample each; "search" is cut from "train" where it is not given.

    Inputs: a tensor, or a tuple or dict of tensors. Without labels, let the target be None and leave loss and metric out.
    """
    images = torch.rand(300, 3, 32, 32)  # replace
    return {"train": TensorDataset(images[:200], images[:200]), "test": TensorDataset(images[200:], images[200:])}
'''
_ARRAYS = '''

class Images(Dataset):
    """Arrays of pixels (N, H, W, C) as normalised tensors, with their labels."""

    def __init__(self, images, labels):
        assert images.shape[3] == len(MEAN) == len(STD), "one mean and one standard deviation for each channel"
        self.images, self.labels = images, labels
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        pixels = torch.from_numpy(self.images[i]).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std, int(self.labels[i])


def datasets() -> dict:
    """Datasets of (inputs, target), one sample each; "search" is cut from "train"."""
    found = {source}
    return {{part: Images(found[f"{{part}}_images"], found[f"{{part}}_labels"]) for part in ("train", "test")}}
'''
_FOLDERS = '''

def datasets() -> dict:
    """Datasets of (inputs, target), one sample each; "search" is cut from "train"."""
    read = transforms.Compose([{steps}])
    return {{"train": {train}, "test": {test}}}
'''
_IMAGENET = "(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's; give those of the training images"


@dataclass(frozen=True)
class _Part:
    """A part of a recipe, and the lines that it needs above it."""

    text: str
    imports: tuple[str, ...] = ()  # of the standard library and of packages
    after: tuple[str, ...] = ()  # constants, and imports of the user's own modules


def draft(name: str, folder: Path, model: str | None, weights: str | None, data: str | None) -> str:
    """Returns the text of a recipe; what is not given, or has no form as a recipe, is a placeholder to be replaced.

    Args:
        name: of the file.
        folder: that it will lie in.
        model: specification as for a run, its path relative to that folder.
        weights: path of a state dict, relative to that folder.
        data: specification as for a run, its path relative to that folder.

    Raises:
        InputError: a file that cannot be imported by its name.
    """
    parts = (_network(model, weights, folder), _samples(data, folder, _statistics(model, folder)))
    after = list(dict.fromkeys(line for part in parts for line in part.after))
    imports = {"import torch", "from torch import nn", *(line for part in parts for line in part.imports)}
    if any("HERE" in text for text in (*after, *(part.text for part in parts))):
        imports.add("from pathlib import Path")
        after.insert(0, "HERE = Path(__file__).resolve().parent")
    standard = {"import sys", "from pathlib import Path"}
    packages = sorted(imports - standard, key=lambda line: (line.split()[1], line.startswith("from"), line))
    blocks = [sorted(imports & standard, reverse=True), packages, after]
    head = _HEAD.format(name=name) + "\n\n".join("\n".join(block) for block in blocks if block) + "\n"
    return head + "".join(part.text for part in parts) + _TAIL


def _network(spec: str | None, weights: str | None, folder: Path) -> _Part:
    scheme, _, name = (spec or "").rpartition(":")
    imports: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    count = "num_classes=1000)  # as many as the weights have"
    if scheme == "torchvision":
        imports, made = ("from torchvision import models",), f"models.get_model({dumps(name)}, weights=None, {count}"
    elif scheme == "timm":
        imports, made = ("import timm",), f"timm.create_model({dumps(name)}, pretrained=False, {count}"
    elif scheme:
        module, imports, after = _own(scheme, folder)
        made = f"{module}.{name}()  # or {module}.{name}(num_classes=...)"
    else:
        return _Part(_UNKNOWN_MODEL)
    lines = ["", "", "def model() -> nn.Module:", '    """The trained network in eval mode."""', f"    network = {made}"]
    if weights is not None:
        tensors = weights.endswith(".safetensors")
        imports += ("from safetensors.torch import load_file",) if tensors else ()
        read = f"load_file(HERE / {dumps(weights)})" if tensors else f"torch.load(HERE / {dumps(weights)}, weights_only=True)"
        lines.append(f"    network.load_state_dict({read})")
    else:
        lines.append("    # network.load_state_dict(torch.load(HERE / FILE, weights_only=True))")
    return _Part("\n".join([*lines, "    return network.eval()", ""]), imports, after)


def _samples(spec: str | None, folder: Path, statistics: str) -> _Part:
    scheme, _, rest = (spec or "").partition(":")
    values = f"MEAN, STD = {statistics}"
    if scheme == "imagefolder":
        parts = _splits(Path(os.path.normpath(folder / rest)))  # the folder need not exist yet
        steps = ["transforms.Resize(256)", "transforms.CenterCrop(224)"]
        made = [f"sets.ImageFolder(HERE / {dumps(f'{rest}/{part}')}, read)" for part in parts]
    elif scheme == "torchvision":
        name, _, rest = rest.partition(":")
        steps, parts = [], ("train", "test")
        made = [f"sets.{name}(HERE / {dumps(rest)}, transform=read, train={part == 'train'})" for part in parts]
    else:
        return _arrays(spec or "", folder, values)
    if not parts:
        return _Part(_UNKNOWN_DATA, ("from torch.utils.data import TensorDataset",))
    imports = ("from torchvision import datasets as sets", "from torchvision import transforms")
    listed = ", ".join([*steps, "transforms.ToTensor()", "transforms.Normalize(MEAN, STD)"])
    return _Part(_FOLDERS.format(steps=listed, train=made[0], test=made[1]), imports, (values,))


def _arrays(spec: str, folder: Path, values: str) -> _Part:
    place, _, name = spec.rpartition(":")
    imports: tuple[str, ...] = ("import numpy as np",)
    after: tuple[str, ...] = ()
    if place == "npz":
        source = f"np.load(HERE / {dumps(name)})"
    elif place:
        module, imports, after = _own(place, folder)
        source = f"{module}.{name}()"
    else:
        return _Part(_UNKNOWN_DATA, ("from torch.utils.data import TensorDataset",))
    return _Part(_ARRAYS.format(source=source), (*imports, "from torch.utils.data import Dataset"), (*after, values))


def _splits(folder: Path) -> tuple[str, ...]:
    """The folders with the training and the test images; () where there is not one of each."""
    from ..data.image_folder import HELD_OUT, TRAIN

    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [next((name for known in each for name in names if name.lower() == known), None) for each in (TRAIN, HELD_OUT)]
    return tuple(name for name in found if name is not None) if None not in found else ()


def _statistics(spec: str | None, folder: Path) -> str:
    """What a run would normalise with: of the model's file or of timm, else ImageNet's."""
    scheme, _, name = (spec or "").rpartition(":")
    if scheme == "timm":
        return f"(getattr(timm.get_pretrained_cfg({dumps(name)}), key) for key in ('mean', 'std'))"
    if scheme.endswith(".py"):
        with suppress(OSError, SyntaxError, ValueError):  # it cannot be read, which a run says
            body = ast.parse(Path(os.path.normpath(folder / scheme)).read_bytes()).body
            targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
            names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if {"MEAN", "STD"} <= names:
                return f"{Path(scheme).stem}.MEAN, {Path(scheme).stem}.STD"
    return _IMAGENET


def _own(place: str, folder: Path) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The name of the user's own module, and the lines that import it."""
    path = Path(place) if place.endswith(".py") else Path(os.path.relpath(Path.cwd(), folder)) / place
    name = path.stem if place.endswith(".py") else place
    if not all(part.isidentifier() for part in name.split(".")):
        do = "rename it, or leave it out and fill in the recipe"
        raise InputError(f"--recipe with {place}", found=f"{name!r}", expected="a name that Python can import", do=do)
    if path.parent == Path():
        return name, (), (f"import {name}",)  # modules beside a recipe can be imported
    return name, ("import sys",), (f"sys.path.insert(0, str(HERE / {dumps(str(path.parent))}))", f"import {name}")
