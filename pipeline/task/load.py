"""Loads and checks model and data before anything is computed: `load_subject`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..config import Config
from ..data.datasets import load_data
from ..data.image_folder import class_order
from ..data.preprocess import IMAGENET_MEAN, IMAGENET_STD, check_augment
from ..data.splits import DataSet
from ..errors import InputError
from ..network.calling import Inputs
from ..network.cost import cost_of
from ..network.weights import state_sha256
from ..signature import Crop, image_signature
from ..types import DataInfo, Preprocess, Splits, Subject
from .classification import Classification
from .models import LoadedModel, evaluation_crop, load_model, resized
from .recipe import Recipe, read_recipe
from .recipe_data import RecipeSamples, data_of
from .recipe_task import open_recipe
from .samples import Data, image_data
from .task import Task

TEST_WAS_CUT = (
    "The data have no test split, so a fifth of the images was held out as one. If the network was trained on these images, its "
    "test accuracy is too high and the drop is not that on unseen images: give DIR/train and DIR/test to measure it."
)
DIGITS_MODEL = "digits-resnet"  # the embedded network: trained on the spot when no weights are given


@dataclass(frozen=True)
class Loaded:
    """A subject with its network and samples."""

    subject: Subject
    module: nn.Module  # the user's dense network, eval mode; gives a tensor or a tuple of them
    task: Task
    data: Data
    example: Inputs  # of one sample
    untrained: bool = False  # the embedded network without weights: it has to be trained first
    images: DataSet | None = None  # what `data` is made of, where it is images
    remarks: tuple[str, ...] = ()  # on how the checkpoint and the images were read

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for the report."""
        return self.remarks if self.subject.data.test_given else (*self.remarks, TEST_WAS_CUT)


def load_subject(config: Config, recipe: Recipe | None = None) -> Loaded:
    """Loads network and data, and decides the preprocessing; by a recipe where one is given or named.

    Raises:
        InputError: see `load_data`, `load_model` and `open_recipe`; or mean and std do not fit the images, or an order of
            classes or the EXIF orientation is asked for with data that are not an image folder.
    """
    if recipe is None and config.recipe is not None:
        recipe = read_recipe(config.recipe)
    if recipe is not None:
        return load_recipe(recipe, config.seed)
    crop = (evaluation_crop(config.model) if config.data.startswith("imagefolder:") else None) or Crop()
    crop = crop if config.image_size is None else resized(crop, config.image_size)
    if config.class_order != "text" and not config.data.startswith("imagefolder:"):
        raise InputError(f"--class-order with --data {config.data}", expected="imagefolder:DIR: arrays have numbered classes")
    if config.exif_orientation and not config.data.startswith("imagefolder:"):
        raise InputError(f"--exif-orientation with --data {config.data}", expected="imagefolder:DIR: arrays have no EXIF data")
    order = class_order(config.class_order)
    crop = replace(crop, exif_orientation=config.exif_orientation)
    images = load_data(config.data, seed=config.seed, crop=crop, order=order)
    info = images.info
    shape = image_shape_of(info)
    model = load_model(
        config.model,
        config.weights,
        classes=len(info.classes),
        image_shape=shape,
        checkpoint_key=config.checkpoint_key,
    )
    preprocess = _preprocess(config, model, shape)
    signature = image_signature(shape, len(info.classes))
    data = image_data(images, preprocess)
    example = data.train.batch(np.arange(1)).inputs
    subject = Subject(model.name, model.sha256, info, preprocess, cost_of(model.module, example), signature, code=model.code)
    untrained = config.model == DIGITS_MODEL and config.weights is None
    return Loaded(subject, model.module, Classification(), data, example, untrained, images, (*model.notes, *images.notes))


def image_shape_of(info: DataInfo) -> tuple[int, int, int]:
    """(C, H, W) of a data set of images."""
    channels, height, width = info.image_shape
    return channels, height, width


def load_recipe(recipe: Recipe, seed: int) -> Loaded:
    """A recipe's network, data and task.

    Raises:
        InputError: see `open_recipe`.
    """
    recipe = replace(recipe)  # its functions may have changed since it was used before
    code = recipe.digest  # of what they were given, not of what they keep from their calls below
    data = data_of(recipe, seed)
    module, task, signature, probe = open_recipe(recipe, data)
    digest = hashlib.sha256(" ".join(split.digest for split in (data.train, data.search, data.test)).encode()).hexdigest()
    info = DataInfo(recipe.name, digest, (), (), Splits(len(data.train), len(data.search), len(data.test)))
    example = pytree.tree_map_only(Tensor, lambda tensor: tensor[:1], probe)
    cost = cost_of(module, example)
    plain = Preprocess((), (), "none")
    subject = Subject(recipe.name, state_sha256(module), info, plain, cost, signature, task.metric, code)
    return Loaded(subject, module, task, data, example, remarks=_sampled(data))


def _sampled(data: Data) -> tuple[str, ...]:
    """That only some samples tell a recipe's data apart, where that is so."""
    splits = [split for split in (data.train, data.search, data.test) if isinstance(split, RecipeSamples)]
    read, whole = sum(len(split.digested) for split in splits), sum(len(split) for split in splits)
    if read == whole:
        return ()
    return (
        f"Changed data are noticed by the recipe's code and {read} of its {whole} samples: where only others changed, earlier"
        " results are used again; another --out computes all of them.",
    )


def _preprocess(config: Config, model: LoadedModel, shape: tuple[int, int, int]) -> Preprocess:
    mean, std = config.mean or model.mean, config.std or model.std
    if mean is None or std is None:
        mean, std = (mean or IMAGENET_MEAN, std or IMAGENET_STD) if shape[0] == 3 else (mean or (0.5,), std or (0.5,))
    for name, values in (("--mean", mean), ("--std", std)):
        if len(values) != shape[0]:
            found = "1 value" if len(values) == 1 else f"{len(values)} values"
            raise InputError(name, found=found, expected=f"one for each of the {shape[0]} image channels")
    augment = config.augment or ("shift" if config.data == "digits" else "crop-flip")
    check_augment(augment)
    return Preprocess(tuple(mean), tuple(std), augment)
