"""Reads image folders, one folder per class.

Files are decoded on reading, resized and cropped as in the model's own evaluation (`Crop`).
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError, described, importing, printable
from ..files import read_regular, sha256_file, without_links
from ..network.compute import usable_cpus
from ..options import CLASS_ORDERS, is_utf8
from ..signature import Crop
from .file_digests import FileDigest, file_digests
from .splits import IntArray, SourceData, UInt8Array

TRAIN, HELD_OUT = ("train", "training"), ("test", "val", "valid", "validation")  # folders, in any case
Order = str | tuple[str, ...]  # of classes: one of CLASS_ORDERS, or their names
SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # torchvision's, and .jfif
TORCHVISION = "install the torchvision built for the installed torch, see constraints.txt"
_STRIP = 10  # times as long as wide: other images are scaled whole, as torchvision does
_ORIENTATION, _TURNED = 0x0112, range(2, 9)  # the EXIF tag, and its values other than upright
_JUNK = (".", "__MACOSX")  # names of files and folders that programs leave behind begin so
_NAMED = 4  # kinds of files that a note names
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

    Hidden files and folders (`.ipynb_checkpoints`) and files that are no images are left out, which a note says. The header
    of every image is read. Classes are sorted as text or by the numbers in their names; or they are given, and some may have no
    images.

    Raises:
        InputError: missing folder, no images, an unreadable image, a link to a folder that it is in, classes that differ between
            training and test folder, or a folder that is not among the classes given.
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
    with importing("torchvision", TORCHVISION):  # which decoding needs
        import torchvision.transforms  # noqa: F401
    opened = [_open_part(spec, part) for part in parts]
    classes, others = opened[0].classes, opened[-1].classes
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
        FolderSource(
            tuple(path for path, _ in part.images),
            np.array([number[part.classes[k]] for _, k in part.images], np.int64),
            crop,
        )
        for part in opened
    ]
    sha256, rotated = _digest(folder, [path for source in sources for path in source.paths], crop.exif_orientation)
    notes = _left_out(opened)
    carrying = f"{rotated} of {sum(len(source.paths) for source in sources)} images carry an EXIF orientation, which is"
    if rotated and crop.exif_orientation:
        notes.append(f"{carrying} applied.")
    elif rotated:
        notes.append(
            f"{carrying} not applied, as in torchvision's ImageFolder: if the network was trained on images turned upright, give"
            " --exif-orientation."
        )
    if order == "text" and ordered != _in_order(classes, "natural"):
        notes.append(
            f"The class folders are in the order of text, as in torchvision's ImageFolder: {', '.join(ordered[:4])} are the"
            " classes 0 to 3. --class-order natural sorts by the numbers in their names."
        )
    name, shape = f"imagefolder:{printable(folder.resolve().name)}", (3, crop.size, crop.size)
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


@dataclass
class _Part:
    """What lies in a folder of class folders."""

    classes: list[str]  # names of the class folders, sorted
    images: list[tuple[Path, int]] = field(default_factory=list)  # with class numbers, in the order of torchvision's ImageFolder
    skipped: Counter[str] = field(default_factory=Counter)  # kinds of files that are no images
    hidden: Counter[str] = field(default_factory=Counter)  # names of hidden folders


def _open_part(spec: str, part: Path) -> _Part:
    """The class folders in a folder and their images; what is hidden or no image is counted."""
    try:
        folders = sorted(child.name for child in part.iterdir() if child.is_dir())
        found = _Part([name for name in folders if not name.startswith(_JUNK)])
        found.hidden.update(name for name in folders if name.startswith(_JUNK))
        if not found.classes:
            raise FileNotFoundError(f"no class folder in {part}")
        for number, name in enumerate(found.classes):
            if not is_utf8(name):
                do = "rename it: the report names the classes"
                raise InputError(f"data {spec}: {part.name}", found=f"a class folder {name!r}", expected="a UTF-8 name", do=do)
            files = [
                Path(folder, file) for folder, names in sorted(_folders(part / name, found.hidden)) for file in sorted(names)
            ]
            images = [path for path in files if _is_image(path, found.skipped)]
            if not images:
                raise FileNotFoundError(f"no image in {part / name}")
            found.images += [(path, number) for path in images]
    except OSError as error:
        found_, do = f"{error}", "put images (.jpg, .png, .bmp, .webp, ...) into one folder per class"
        raise InputError(f"data {spec}: {part.name}", found=found_, expected="class folders with images", do=do) from error
    return found


def _folders(top: Path, hidden: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, links included, each with the names of its files; hidden folders are only counted.

    Raises:
        InputError: a link leads to a folder that it is in: its files would be found again and again.
    """
    waiting: list[tuple[Path, Path, tuple[Path, ...]]] = [(top, without_links(top.parent), ())]
    while waiting:
        folder, parent, followed = waiting.pop()  # `parent` and the places of the links that were followed: without links
        real = parent / folder.name
        if folder.is_symlink():
            real, followed = without_links(folder), (*followed, parent)
            if any(place.is_relative_to(real) for place in followed):
                raise InputError(f"folder {folder}", found=f"a link to {real}, which it is in", expected="images", do="remove it")
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    names.append(entry.name)
                elif entry.name.startswith(_JUNK):
                    hidden[entry.name] += 1
                else:
                    waiting.append((folder / entry.name, real, followed))
        yield str(folder), names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_image(path: Path, skipped: Counter[str]) -> bool:
    """Whether a file is an image by its name; others are counted by their suffixes.

    Raises:
        InputError: an entry named like an image is not a regular file.
    """
    suffix = path.suffix.lower()
    if path.name.startswith(_JUNK) or suffix not in SUFFIXES:
        skipped["hidden" if path.name.startswith(_JUNK) else suffix or "without a suffix"] += 1
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


def _left_out(parts: Sequence[_Part]) -> list[str]:
    """A note on the files and folders that are not read, where there are some."""
    skipped, hidden = Counter[str](), Counter[str]()
    for part in parts:
        skipped.update(part.skipped)
        hidden.update(part.hidden)
    said = []
    for what, counts in (("files that are no images by their names", skipped), ("hidden folders", hidden)):
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{count:,} {printable(kind)}" for kind, count in ordered[:_NAMED]]
        if rest := sum(count for _, count in ordered[_NAMED:]):
            shown.append(f"{rest:,} others")
        if shown:
            said.append(f"{what} ({', '.join(shown)})")
    return [f"Left out of the image folder: {' and '.join(said)}."] if said else []


def _decode(path: Path, crop: Crop) -> UInt8Array:
    from torchvision import transforms

    resize = transforms.Resize(crop.resize, transforms.InterpolationMode(crop.interpolation))
    with _decoding(path), Image.open(path) as image:
        upright = ImageOps.exif_transpose(image) if crop.exif_orientation and _has_orientation(image) else image
        cropped = transforms.CenterCrop(crop.size)(resize(_middle(_eight_bits(upright)).convert("RGB")))
    return np.asarray(cropped, np.uint8)


def _has_orientation(image: Image.Image) -> bool:
    """Whether an image's header says that it is to be turned or mirrored. Pillow itself does so with TIFF."""
    # of a PNG, its own `getexif` would decode the pixels first
    return image.format != "TIFF" and Image.Image.getexif(image).get(_ORIENTATION) in _TURNED


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


def _digest(root: Path, paths: list[Path], turned: bool) -> tuple[str, int]:
    """SHA-256 of relative paths, file contents and which images are turned, and the number of those with an EXIF orientation.

    Raises:
        InputError: a file cannot be read or is not an image.
    """
    ordered = sorted(paths)
    found = file_digests(root, ordered, _header, THREADS)
    digest = hashlib.sha256()
    for path, each in zip(ordered, found, strict=True):
        digest.update(bytes(path.relative_to(root)) + b"\0" + bytes.fromhex(each.sha256) + b"turned" * (turned and each.rotated))
    return digest.hexdigest(), sum(each.rotated for each in found)


def _header(path: Path) -> FileDigest:
    with _decoding(path), Image.open(path) as image:
        return FileDigest(sha256_file(path), _has_orientation(image))


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Pillow's plug-ins raise what they like on broken files
        found = described(error)
        raise InputError(f"image {path}", found=found, expected="an image Pillow can read", do="repair or remove it") from error
