"""Loads and checks model and data before anything is computed: `load_subject`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config import Config
from ..errors import InputError
from ..network.cost import cost_of
from ..types import Crop, Preprocess, Subject
from .datasets import load_data
from .models import LoadedModel, evaluation_crop, load_model, resized
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, check_augment
from .splits import DataSet

TEST_WAS_CUT = (
    "The data have no test split, so a fifth of the images was held out as one. If the network was trained on these images, its "
    "test accuracy is too high and the drop is not that on unseen images: give DIR/train and DIR/test to measure it."
)
DIGITS_MODEL = "digits-resnet"  # the embedded network: trained on the spot when no weights are given


@dataclass(frozen=True)
class Loaded:
    """A subject with its network and images."""

    subject: Subject
    module: nn.Module  # the user's dense network, eval mode
    data: DataSet
    untrained: bool  # the embedded network without weights: it has to be trained first

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for the report."""
        return () if self.subject.data.test_given else (TEST_WAS_CUT,)


def load_subject(config: Config) -> Loaded:
    """Loads model and data, and decides the preprocessing.

    Raises:
        InputError: see `load_data` and `load_model`; or mean and std do not fit the images.
    """
    crop = (evaluation_crop(config.model) if config.data.startswith("imagefolder:") else None) or Crop()
    crop = crop if config.image_size is None else resized(crop, config.image_size)
    data = load_data(config.data, seed=config.seed, crop=crop)
    shape = data.info.image_shape
    model = load_model(config.model, config.weights, classes=len(data.info.classes), image_shape=shape)
    preprocess = _preprocess(config, model, shape)
    subject = Subject(model.name, model.sha256, data.info, preprocess, cost_of(model.module, shape))
    return Loaded(subject, model.module, data, untrained=config.model == DIGITS_MODEL and config.weights is None)


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
