"""Drafts a recipe from what `init` is given: model() and datasets() filled in where --model, --weights and --data say how."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path

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
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        pixels = torch.from_numpy(self.images[i]).permute(2, 0, 1).float() / 255
        return (pixels - MEAN) / STD, int(self.labels[i])


def datasets() -> dict:
    """Datasets of (inputs, target), one sample each; "search" is cut from "train"."""
    found = {source}
    return {{part: Images(found[f"{{part}}_images"], found[f"{{part}}_labels"]) for part in ("train", "test")}}
'''
_FOLDERS = '''

def datasets() -> dict:
    """Datasets of (inputs, target), one sample each; "search" is cut from "train"."""
    read = transforms.Compose({steps})
    return {{"train": {train}, "test": {test}}}
'''
_IMAGENET = "(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)"


@dataclass(frozen=True)
class _Part:
    """A part of a recipe, and the lines that it needs above it."""

    text: str
    imports: tuple[str, ...] = ()  # of the standard library and of packages
    after: tuple[str, ...] = ()  # constants, and imports of the user's own modules


def draft(name: str, model: str | None, weights: str | None, data: str | None) -> str:
    """Returns the text of a recipe; what is not given, or has no form as a recipe, is a placeholder to be replaced.

    Args:
        name: of the file.
        model: specification as for a run, its path relative to the recipe's folder.
        weights: path of a state dict, relative to that folder.
        data: specification as for a run, its path relative to that folder.
    """
    parts = (_network(model, weights), _samples(data))
    after = list(dict.fromkeys(line for part in parts for line in part.after))
    imports = {"import torch", "from torch import nn", *(line for part in parts for line in part.imports)}
    if any("HERE" in text for text in (*after, *(part.text for part in parts))):
        imports.add("from pathlib import Path")
        after.insert(0, "HERE = Path(__file__).resolve().parent")
    standard = {"import sys", "from pathlib import Path"}
    blocks = [
        sorted(imports & standard, reverse=True),
        sorted(imports - standard, key=lambda line: (line.split()[1].lower(), line[0] == "f")),
        after,
    ]
    head = _HEAD.format(name=name) + "\n\n".join("\n".join(block) for block in blocks if block) + "\n"
    return head + "".join(part.text for part in parts) + _TAIL


def _network(spec: str | None, weights: str | None) -> _Part:
    scheme, _, name = (spec or "").rpartition(":")
    imports: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    count = "num_classes=1000)  # as many as the weights have"
    if scheme == "torchvision":
        imports, made = ("from torchvision import models",), f"models.get_model({dumps(name)}, weights=None, {count}"
    elif scheme == "timm":
        imports, made = ("import timm",), f"timm.create_model({dumps(name)}, pretrained=False, {count}"
    elif scheme:
        imports, after = _own(scheme, name)
        made = f"{name}()  # or {name}(num_classes=...)"
    else:
        return _Part(_UNKNOWN_MODEL, ("import torch", "from torch import nn"))
    lines = ["", "", "def model() -> nn.Module:", '    """The trained network in eval mode."""', f"    network = {made}"]
    if weights is not None:
        tensors = weights.endswith(".safetensors")
        imports += ("from safetensors.torch import load_file",) if tensors else ()
        read = f"load_file(HERE / {dumps(weights)})" if tensors else f"torch.load(HERE / {dumps(weights)}, weights_only=True)"
        lines.append(f"    network.load_state_dict({read})")
    else:
        lines.append("    # network.load_state_dict(torch.load(HERE / FILE, weights_only=True))")
    return _Part("\n".join([*lines, "    return network.eval()", ""]), imports, after)


def _samples(spec: str | None) -> _Part:
    scheme, _, rest = (spec or "").partition(":")
    imports: tuple[str, ...]
    after: tuple[str, ...]
    statistics = "MEAN, STD = {}  # of the training images' pixels, scaled to [0, 1]"
    if scheme in ("imagefolder", "torchvision"):
        name, _, folder = rest.partition(":") if scheme == "torchvision" else ("ImageFolder", "", rest)
        imports = ("from torchvision import datasets as sets", "from torchvision import transforms")
        steps = "[transforms.ToTensor(), transforms.Normalize(MEAN, STD)]"
        if scheme == "imagefolder":
            steps = f"[transforms.Resize(256), transforms.CenterCrop(224)] + {steps}"
            read = {part: f'sets.ImageFolder(HERE / {dumps(folder)} / "{part}", read)' for part in ("train", "test")}
        else:
            made = f"sets.{name}(HERE / {dumps(folder)}, transform=read, train="
            read = {part: f"{made}{part == 'train'})" for part in ("train", "test")}
        return _Part(_FOLDERS.format(steps=steps, **read), imports, (statistics.format(_IMAGENET),))
    imports, after = (), ()
    if scheme == "npz":
        source, imports = f"np.load(HERE / {dumps(rest)})", ("import numpy as np",)
    elif rest:
        place, _, name = (spec or "").rpartition(":")
        imports, after = _own(place, name)
        source = f"{name}()"
    else:
        return _Part(_UNKNOWN_DATA, ("from torch.utils.data import TensorDataset",))
    shaped = f"(torch.tensor(values).view(-1, 1, 1) for values in ({_IMAGENET}))"
    imports += ("from torch.utils.data import Dataset",)
    return _Part(_ARRAYS.format(source=source), imports, (*after, statistics.format(shaped)))


def _own(place: str, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The imports of packages and of the user's own module that a function of it needs."""
    if not place.endswith(".py"):
        return (), (f"from {place} import {name}",)
    path = Path(place)
    found = f"from {path.stem} import {name}"
    if path.parent == Path():
        return (), (found,)  # modules beside a recipe can be imported
    return ("import sys",), (f"sys.path.insert(0, str(HERE / {dumps(str(path.parent))}))", found)
