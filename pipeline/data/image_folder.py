"""Reads image folders (one folder per class) and torchvision's data set classes (`torchvision:NAME:DIR`).

Files are decoded on reading, resized and cropped as in the model's own evaluation (`Crop`).
"""

from __future__ import annotations

import hashlib
import inspect
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError, described, importing
from ..files import read_regular, sha256_file
from ..network.compute import usable_cpus
from ..options import CLASS_ORDERS
from ..types import Crop
from .file_digests import FileDigest, file_digests
from .splits import IntArray, SourceData, UInt8Array

TRAIN, HELD_OUT = ("train", "training"), ("test", "val", "valid", "validation")  # folders, in any case
Order = str | tuple[str, ...]  # of classes: one of CLASS_ORDERS, or their names
SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # torchvision's, and .jfif
TORCHVISION = "install the torchvision built for the installed torch, see constraints.txt"
_STRIP = 10  # times as long as wide: other images are scaled whole, as torchvision does
_ORIENTATION = 0x0112  # the EXIF tag
_NO_FILES = tuple(Path(name) for name in ("/proc", "/sys", "/dev"))  # reading there may block or never end
THREADS = min(8, usable_cpus())  # Pillow and hashlib let go of the interpreter lock


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files with labels, decoded on reading."""

    paths: tuple[Path, ...]
    labels: IntArray  # (N,)
    crop: Crop

    def read(self, indices: IntArray) -> UInt8Array:
        """Pixels (n, S, S, 3), S = crop.size.

        Raises:
            InputError: a file cannot be decoded.
        """
        images = np.empty((len(indices), self.crop.size, self.crop.size, 3), np.uint8)
        with ThreadPoolExecutor(THREADS) as pool:
            decoded = pool.map(lambda i: _decode(self.paths[int(i)], self.crop), indices)
            for position, image in enumerate(decoded):
                images[position] = image
        return images


def class_order(value: str) -> Order:
    """Returns the order of classes that `text`, `natural` or the name of a file with one class a line asks for.

    Raises:
        InputError: the file cannot be read, is empty, or names a class twice.
    """
    if value in CLASS_ORDERS:
        return value
    try:
        lines = read_regular(Path(value)).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or described(error)
        raise InputError(
            f"--class-order {value}", found=found, expected=f"{' or '.join(CLASS_ORDERS)}, or a text file"
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        found = "no class" if twice is None else f"{twice!r} twice"
        raise InputError(f"--class-order {value}", found=found, expected="the name of one class folder a line")
    return names


def open_folder(spec: str, folder: Path, crop: Crop, order: Order = "text") -> SourceData:
    """Returns the images of a folder: `DIR/train/CLASS/*` with `DIR/test` (or `DIR/val`), or `DIR/CLASS/*`.

    Hidden files and folders (`.ipynb_checkpoints`) are ignored. The header of every image is read. Classes are sorted
    as text or by the numbers in their names; or they are given, and some may have no images.

    Raises:
        InputError: missing folder, no images, an unreadable image, classes that differ between training and test folder, or a
            folder that is not among the classes given.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise InputError(f"data {spec}", found=found, expected="a folder with one folder per class", do="check the path")
    parts = [folder]
    found_parts = {child.name.casefold(): child for child in sorted(folder.iterdir(), reverse=True) if child.is_dir()}
    train = [found_parts[name] for name in TRAIN if name in found_parts]
    if train:
        held_out = [found_parts[name] for name in HELD_OUT if name in found_parts]
        if not held_out:
            expected, do = "train and test (or val)", "add the test images, or put the class folders straight into the folder"
            raise InputError(f"data {spec}", found="train without test", expected=expected, do=do)
        parts = [train[0], held_out[0]]
    opened = [_open_part(spec, part) for part in parts]
    classes, others = opened[0][0], opened[-1][0]
    if not isinstance(order, str):
        extra = sorted({*classes, *others} - {*order})
        if extra:
            expected = f"the {len(order)} classes given, {order[0]!r} to {order[-1]!r}"
            raise InputError(
                f"data {spec}", found=f"a folder {extra[0]!r}", expected=expected, do="make the folders and the classes alike"
            )
    elif others != classes:
        differing = sorted(set(classes) ^ set(others))
        found = f"{len(classes)} classes in train, {len(others)} in {parts[-1].name}, {differing[0]!r} in one only"
        raise InputError(f"data {spec}", found=found, expected="the same class folders in both", do="make the folders alike")
    ordered = _in_order(classes, order)
    number = {name: position for position, name in enumerate(ordered)}
    sources = [
        FolderSource(tuple(Path(p) for p, _ in images), np.array([number[names[k]] for _, k in images], np.int64), crop)
        for names, images in opened
    ]
    sha256, rotated = _digest(folder, [path for source in sources for path in source.paths])
    notes = []
    if rotated:
        notes.append(
            f"{rotated} images carry an EXIF orientation, which is not applied, as in torchvision's ImageFolder: if the network"
            " was trained on rotated images, rotate the files."
        )
    if order == "text" and ordered != _in_order(classes, "natural"):
        notes.append(
            f"The class folders are in the order of text, as in torchvision's ImageFolder: {', '.join(ordered[:4])} are the"
            " classes 0 to 3. --class-order natural sorts by the numbers in their names."
        )
    name, shape = f"imagefolder:{folder.resolve().name}", (3, crop.size, crop.size)
    test = sources[1] if len(sources) > 1 else None  # None where DIR contains the class folders themselves
    return SourceData(name, ordered, shape, sha256, sources[0], test, crop=crop, notes=tuple(notes))


def _in_order(classes: Sequence[str], order: Order) -> tuple[str, ...]:
    if not isinstance(order, str):
        return order
    return tuple(sorted(classes, key=_by_numbers if order == "natural" else None))


def _by_numbers(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts `9` before `10`; names of equal numbers (`1`, `01`) as text."""
    parts = re.split(r"([0-9]+)", name)
    return (*((int(part), "") if part.isdecimal() else (0, part) for part in parts), (0, name))


def read_dataset_class(spec: str, rest: str) -> tuple[str, dict[str, Any]]:
    """Returns name and arrays (keys as in an npz file) of `NAME:DIR`, NAME a torchvision data set class that takes `train=`.

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
    for part in ("train", "test"):
        try:
            items: Any = factory(str(Path(folder).expanduser()), train=part == "train", download=False)
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
    return f"torchvision:{name}", arrays


def _is_image(name: str) -> bool:
    path = Path(name)
    if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
        return False
    try:
        whole = path.resolve(strict=True)
        plain = stat.S_ISREG(whole.stat().st_mode) and not any(whole.is_relative_to(place) for place in _NO_FILES)
        found = "a pipe, a device or a socket"
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        plain, found = False, getattr(error, "strerror", None) or str(error)
    if not plain:
        raise InputError(f"image {path}", found=found, expected="a file", do="remove it")
    return True


def _open_part(spec: str, part: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Names of the class folders, sorted, and (path, class number) of every image."""
    with importing("torchvision", TORCHVISION):
        from torchvision import datasets
    try:
        junk = (".", "__MACOSX")
        classes = sorted(child.name for child in part.iterdir() if child.is_dir() and not child.name.startswith(junk))
        if not classes:
            raise FileNotFoundError(f"no class folder in {part}")
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, datasets.folder.make_dataset(str(part), numbers, is_valid_file=_is_image)
    except (FileNotFoundError, OSError) as error:
        found, do = f"{error}", "put images (.jpg, .png, .bmp, .webp, ...) into one folder per class"
        raise InputError(f"data {spec}: {part.name}", found=found, expected="class folders with images", do=do) from error


def _decode(path: Path, crop: Crop) -> UInt8Array:
    from torchvision import transforms

    resize = transforms.Resize(crop.resize, transforms.InterpolationMode(crop.interpolation))
    with _decoding(path), Image.open(path) as image:
        cropped = transforms.CenterCrop(crop.size)(resize(_middle(_eight_bits(image)).convert("RGB")))
    return np.asarray(cropped, np.uint8)


def _middle(image: Image.Image) -> Image.Image:
    """Returns the image; of a strip its middle, which is all that the crop leaves: scaled whole, it could take gigabytes."""
    short, long = sorted(image.size)
    if long <= _STRIP * short:
        return image
    left = (long - _STRIP * short) // 2  # as much on both sides: the middle stays where it was
    box = (left, 0, long - left, short) if image.width == long else (0, left, short, long - left)
    return image.crop(box)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns the image with 8 bits a channel; Pillow's own conversion clips 16-bit greyscale at 255.

    Raises:
        ValueError: its numbers have no known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range: save as 8 or 16 bit")
    return image


def _digest(root: Path, paths: list[Path]) -> tuple[str, int]:
    """SHA-256 of relative paths and file contents, and the number of images with an EXIF orientation.

    Raises:
        InputError: a file cannot be read or is not an image.
    """
    ordered = sorted(paths)
    found = file_digests(root, ordered, _header, THREADS)
    digest = hashlib.sha256()
    for path, each in zip(ordered, found, strict=True):
        digest.update(bytes(path.relative_to(root)) + b"\0" + bytes.fromhex(each.sha256))
    return digest.hexdigest(), sum(each.rotated for each in found)


def _header(path: Path) -> FileDigest:
    with _decoding(path), Image.open(path) as image:
        rotated = image.format in ("JPEG", "MPO") and image.getexif().get(_ORIENTATION, 1) not in (0, 1)
        return FileDigest(sha256_file(path), rotated)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Pillow's plug-ins raise what they like on broken files
        found = described(error)
        raise InputError(f"image {path}", found=found, expected="an image Pillow can read", do="repair or remove it") from error
