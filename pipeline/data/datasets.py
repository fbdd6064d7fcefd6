"""Reads labelled images and splits them into train (calibration), search (validation) and test.

The search split is cut from the training images; every choice is made on it. The test split is only read for the report.
Pixels stay uint8 (n, H, W, C) until `preprocess` turns them into network inputs.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, described, importing
from ..network.compute import free_bytes
from ..options import is_utf8
from ..signature import Crop
from ..types import DataInfo, Splits
from .image_folder import TORCHVISION, Order, open_folder
from .npz import NPZ_KEYS, read_npz, wrong_count
from .splits import ArraySource, DataSet, IntArray, SourceData, Split, UInt8Array
from .user_code import functions_in, located, user_factory, users_code

SCHEMES = ("digits", "npz:FILE", "imagefolder:DIR", "torchvision:NAME:DIR", "FILE.py:FACTORY")
MIN_TRAIN = 10  # training images, to cut a train and a search split from
MAX_CLASSES = 100_000  # without `classes`, larger labels are not taken for class numbers
SHOWN = 5  # names in a note
DIGITS_TEST_SEED = 0  # the test images of `digits` are the same for every seed


def load_data(spec: str, *, seed: int, crop: Crop | None = None, order: Order = "text") -> DataSet:
    """Returns the data set that `spec` names, split into train, search and test.

    Args:
        spec: one of `SCHEMES`.
        seed: decides what goes into the search split and the order of train and search. The test split keeps the given images
            in their order; a flat image folder has none, so a fifth of it is held out with this seed.
        crop: how images of an image folder are resized and cropped, default `Crop()`. Arrays stay as they are.
        order: of the classes of an image folder, see `class_order`. Arrays have numbers.

    Raises:
        InputError: the data is missing or unusable.
        UnavailableError: the user's factory needs a package that is not installed.
    """
    scheme, _, rest = spec.partition(":")
    if spec == "digits":
        data = _digits()
    elif scheme == "npz" and rest:
        data = _npz(spec, located(rest, f"data {spec}"))
    elif scheme == "imagefolder" and rest:
        data = open_folder(spec, located(rest, f"data {spec}"), crop or Crop(), order)
    elif scheme == "torchvision" and rest:
        data = _dataset_class(spec, rest)
    elif spec.rpartition(":")[0].endswith(".py"):
        data = _factory(spec)
    else:
        scheme = (
            "" if ":" in spec or not spec else "npz:" if spec.endswith(".npz") else "imagefolder:" if Path(spec).is_dir() else ""
        )
        do = f"did you mean {scheme}{spec}?" if scheme else "see --help"
        if spec.endswith(".py") and (near := functions_in(spec)):
            do = f"name one of its functions: {', '.join(f'{spec}:{name}' for name in near[:SHOWN])}"
        raise InputError("unknown data", found=repr(spec), expected="one of " + ", ".join(SCHEMES), do=do)
    return _split(spec, data, seed)


def cut(labels: IntArray, count: int, seed: int) -> tuple[IntArray, IntArray]:
    """Returns shuffled positions (rest, cut) with `count` in the second, stratified by class where every class allows it."""
    from sklearn.model_selection import train_test_split  # a second and more, which recipes need not wait for

    present, members = np.unique(labels, return_counts=True)
    rng = np.random.default_rng(seed)
    if members.min() >= 2 and len(present) <= min(count, len(labels) - count):
        state = int(rng.integers(2**31))
        rest, part = train_test_split(np.arange(len(labels)), test_size=count, stratify=labels, random_state=state)
    else:
        order = rng.permutation(len(labels))
        rest, part = order[count:], order[:count]
    return np.asarray(rest, np.int64), np.asarray(part, np.int64)


def search_size(train: int) -> int:
    """Returns the size of the search split: a tenth of `train`, of small sets a fifth (up to 500), at most 5,000."""
    return min(5000, max(train // 10, min(train // 5, 500)))


def _split(spec: str, data: SourceData, seed: int) -> DataSet:
    if len(data.classes) < 2:
        raise InputError(f"data {spec}", found=f"{len(data.classes)} class", expected="at least 2", do="add the other classes")
    everything = np.arange(len(data.train.labels), dtype=np.int64)
    if len(everything) < MIN_TRAIN + (data.test is None):
        found, expected = f"{len(everything)} training images", f"at least {MIN_TRAIN} to cut train and search from"
        raise InputError(f"data {spec}: too few images for three splits", found=found, expected=expected, do="add images")
    if data.test is None:
        test_seed = seed if data.test_seed is None else data.test_seed
        rest, held_out = cut(data.train.labels, max(1, len(everything) // 5), test_seed)
        everything, test = np.sort(rest), Split(data.train, np.sort(held_out))
    else:
        test = Split(data.test, np.arange(len(data.test.labels), dtype=np.int64))
    rest, part = cut(data.train.labels[everything], search_size(len(everything)), seed)
    train, search = Split(data.train, everything[rest]), Split(data.train, everything[part])
    splits = Splits(len(train), len(search), len(test))
    given = data.test is not None or data.test_seed is not None
    info = DataInfo(data.name, data.sha256, data.classes, data.image_shape, splits, data.crop, given)
    absent = _absent_classes(data.classes, {"training": train, "search": search, "test": test})
    return DataSet(info, train, search, test, (*data.notes, *absent))


def _absent_classes(classes: tuple[str, ...], splits: Mapping[str, Split]) -> Iterator[str]:
    """A sentence for each set of classes that some of the splits have no image of."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    for name, split in splits.items():
        present = set(np.unique(split.labels).tolist())
        if absent := tuple(label for number, label in enumerate(classes) if number not in present):
            lacking.setdefault(absent, []).append(f"the {name} split (of {len(split):,})")
    for absent, names in lacking.items():
        shown = ", ".join(absent[:SHOWN]) + (f" and {len(absent) - SHOWN:,} more" if len(absent) > SHOWN else "")
        yield (
            f"Classes without an image in {', '.join(names)}: {len(absent):,} of {len(classes):,} ({shown})."
            " What pruning does to them is not seen there."
        )


def _digits() -> SourceData:
    """Returns 1,797 scanned digits of 8x8 pixels with 16 grey levels (UCI optical recognition, in scikit-learn)."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    images = np.rint(scans.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    source = ArraySource(images, labels.astype(np.int64))
    names = tuple(str(i) for i in range(10))
    return SourceData("digits", names, (1, 8, 8), _digest(source), source, None, DIGITS_TEST_SEED)


def _npz(spec: str, path: Path) -> SourceData:
    return _from_arrays(spec, f"npz:{path.name}", read_npz(spec, path, free_bytes()))


def _dataset_class(spec: str, rest: str) -> SourceData:
    """Returns the images of `NAME:DIR`, NAME a data set class of torchvision that takes `train=`.

    Raises:
        InputError: no such class, its files are not in DIR, or its images have several shapes.
    """
    with importing("torchvision", TORCHVISION):
        from torchvision import datasets
    name, _, folder = rest.partition(":")
    factory = getattr(datasets, name, None)
    if not isinstance(factory, type) or "train" not in inspect.signature(factory).parameters or not folder:
        expected = "torchvision:NAME:DIR with a class of torchvision.datasets that takes train=, such as CIFAR10"
        do = "keep other data sets as imagefolder:DIR or npz:FILE"
        raise InputError(f"data {spec}", found=repr(rest), expected=expected, do=do)
    arrays: dict[str, Any] = {}
    place = located(folder, f"data {spec}")
    for part in ("train", "test"):
        try:
            items: Any = factory(str(place), train=part == "train", download=False)
            pairs = [(np.asarray(image), int(label)) for image, label in items]
        except Exception as error:  # its readers assert what damaged files do not have
            do = f"put them there: torchvision.datasets.{name}(DIR, download=True) fetches them"
            found = described(error)
            raise InputError(f"data {spec}: cannot read {name}", found=found, expected=f"its files in {folder}", do=do) from error
        shapes = sorted({image.shape for image, _ in pairs})
        if len(shapes) != 1:
            found, do = f"{len(shapes)} shapes: {shapes[:3]}", "keep them as imagefolder:DIR, which crops to one size"
            raise InputError(f"data {spec}: {part} images", found=found, expected="one shape", do=do)
        stack = np.stack([image for image, _ in pairs])
        arrays[f"{part}_images"] = stack[..., np.newaxis] if stack.ndim == 3 else stack
        arrays[f"{part}_labels"] = np.asarray([label for _, label in pairs], np.int64)
        if getattr(items, "classes", None):
            arrays["classes"] = np.asarray([str(c) for c in items.classes])
    return _from_arrays(spec, f"torchvision:{name}", arrays)


def _factory(spec: str) -> SourceData:
    factory = user_factory(spec, "data")
    folder = Path(spec.rpartition(":")[0]).expanduser().resolve().parent
    with users_code(folder, f"data {spec}: the factory failed", do="call it on its own to see where"):
        arrays = factory.function()
    if not isinstance(arrays, Mapping):
        expected = "a mapping with " + ", ".join(NPZ_KEYS)
        raise InputError(f"data {spec}", found=f"a {type(arrays).__name__}", expected=expected, do="return a dict of arrays")
    # ragged lists, tensors without values, a mapping whose own code raises
    with users_code(folder, f"data {spec}", expected="arrays", do="return plain numpy arrays"):
        plain = {key: np.asarray(arrays[key]) for key in (*NPZ_KEYS, "classes") if key in arrays}
    return _from_arrays(spec, factory.name, plain)


def _from_arrays(spec: str, name: str, arrays: Mapping[str, Any]) -> SourceData:
    """Checks a mapping with the keys of an npz file and returns its data set."""
    missing = [key for key in NPZ_KEYS if key not in arrays]
    if missing:
        found = f"no {', '.join(missing)}"
        raise InputError(f"data {spec}", found=found, expected=", ".join(NPZ_KEYS), do="name the arrays so")
    train_images, test_images = (_images(f"data {spec}: {part}_images", arrays[f"{part}_images"]) for part in ("train", "test"))
    if train_images.shape[1:] != test_images.shape[1:]:
        found, expected = f"{test_images.shape[1:]} (H, W, C)", f"{train_images.shape[1:]} as in train_images"
        raise InputError(f"data {spec}: test_images", found=found, expected=expected, do="make all images one shape")
    classes = _class_names(f"data {spec}: classes", arrays["classes"]) if "classes" in arrays else None
    train_labels = _labels(f"data {spec}: train_labels", arrays["train_labels"], len(train_images), classes)
    if classes is None:  # from the training labels: a class only in the test labels was never learnt
        classes = tuple(str(i) for i in range(int(train_labels.max()) + 1))
    test_labels = _labels(f"data {spec}: test_labels", arrays["test_labels"], len(test_images), classes)
    train, test = ArraySource(train_images, train_labels), ArraySource(test_images, test_labels)
    _, height, width, channels = train_images.shape
    return SourceData(name, classes, (channels, height, width), _digest(train, test), train, test)


def _images(what: str, value: Any) -> UInt8Array:
    images, expected = np.asarray(value), "uint8 (N, H, W, C), pixels 0..255"
    if images.dtype.kind == "f":
        carrying = sum(int(not np.isfinite(image).all()) for image in images)
        scale = "x.astype('uint8')" if images.size and np.nanmax(images) > 1 else "(x * 255).round().astype('uint8')"
        found = f"{images.dtype} with NaN or infinity in {carrying} of {len(images)} images" if carrying else str(images.dtype)
        do = "remove or repair those images" if carrying else f"store {scale}"
        raise InputError(what, found=found, expected=expected, do=do)
    if images.dtype != np.uint8:
        raise InputError(what, found=str(images.dtype), expected=expected, do="store pixels as uint8")
    if images.ndim != 4:
        do = "add a last axis of length 1" if images.ndim == 3 else "store one 4-dimensional array"
        raise InputError(what, found=f"shape {images.shape}", expected=expected, do=do)
    if images.size == 0:
        raise InputError(what, found=f"shape {images.shape}: no image", expected=expected, do="put images into it")
    if images.shape[1] <= 4 < images.shape[3]:
        found, do = f"shape {images.shape}, channels first", "store x.transpose(0, 2, 3, 1)"
        raise InputError(what, found=found, expected=expected, do=do)
    return images


def _class_names(what: str, value: Any) -> tuple[str, ...]:
    names = np.asarray(value)
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        found = f"{names.dtype} of shape {names.shape}"
        raise InputError(what, found=found, expected="a list of names", do="store one string for each class")
    texts = tuple(n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in names.tolist())
    if wrong := [text for text in texts if not is_utf8(text)]:
        raise InputError(what, found=repr(wrong[0]), expected="text that can be written as UTF-8", do="rename the class")
    return texts


def _labels(what: str, value: Any, count: int, classes: tuple[str, ...] | None) -> IntArray:
    labels = np.asarray(value)
    top = MAX_CLASSES if classes is None else len(classes)
    expected = f"integers 0..{top - 1} (N,)"
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        found = f"{labels.dtype} of shape {labels.shape}"
        raise InputError(what, found=found, expected=expected, do="store one class number for each image")
    if len(labels) != count:
        raise wrong_count(what, len(labels), count)
    wrong = labels[(labels < 0) | (labels >= top)]
    if len(wrong):
        found = f"label {wrong[0]} ({len(wrong)} out of range)"
        raise InputError(what, found=found, expected=expected, do="number the classes from 0, in the order of `classes`")
    return labels.astype(np.int64)


def _digest(*sources: ArraySource) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr(source.images.shape).encode())
        digest.update(np.ascontiguousarray(source.images).data)
        digest.update(np.ascontiguousarray(source.labels, np.dtype("<i8")).data)
    return digest.hexdigest()
