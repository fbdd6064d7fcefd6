"""Reads .npz files. Needs no torch: the numbers of labels and images are compared before it is imported."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def read_npz(spec: str, path: Path, free: int) -> dict[str, Any]:
    """Returns the arrays of an .npz, those of `NPZ_KEYS` and `classes`.

    Args:
        spec: what the user named the file by, for messages.
        path: the file.
        free: bytes of memory that the arrays may take.

    Raises:
        InputError: no such file, not an .npz, arrays of Python objects, or too large.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"data {spec}", found=found, expected="an .npz file", do="check the path")
    damaged = InputError(
        f"data {spec}",
        found="a file that is not an .npz, or a damaged one",
        expected="an .npz with " + ", ".join(NPZ_KEYS),
        do="write it with numpy.savez",
    )
    too_large = InputError(f"data {spec}", found="arrays that do not fit in the memory", do="store fewer or smaller images")
    try:  # numpy, zipfile and the codecs below them raise a dozen kinds on damaged or encrypted files
        needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in _headers(path).values())
    except Exception as error:
        raise damaged from error
    if needed > free:
        raise too_large
    arrays: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in (k for k in archive.files if k in (*NPZ_KEYS, "classes")):
                try:
                    arrays[key] = archive[key]
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
                    do = "make all images one size and save plain arrays, without pickles"
                    expected = "an array of strings" if key == "classes" else "an array of integers"
                    raise InputError(f"data {spec}: {key}", found="an object array", expected=expected, do=do) from error
    except InputError:
        raise
    except MemoryError as error:
        raise too_large from error
    except Exception as error:
        raise damaged from error
    return arrays


def check_counts(spec: str) -> None:
    """Compares the numbers of labels and images by the headers of the file that `npz:FILE` names; no array is read.

    Whatever else is wrong with the file is left for `read_npz` to name.

    Raises:
        InputError: a split has more or fewer labels than images.
    """
    path = Path(spec.removeprefix("npz:"))
    try:
        found = _headers(path) if path.is_file() else {}
    except Exception:
        return
    for part in ("train", "test"):
        images, labels = (found[key][0] if (key := f"{part}_{kind}") in found else () for kind in ("images", "labels"))
        if images and labels and images[0] != labels[0]:
            raise wrong_count(f"data {spec}: {part}_labels", labels[0], images[0])


def wrong_count(what: str, labels: int, images: int) -> InputError:
    """The error for labels that are not as many as the images."""
    found, do = f"{labels} labels for {images} images", "check how the arrays were cut"
    return InputError(what, found=found, expected="as many labels as images", do=do)


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of the arrays in an .npz, by their headers; compressed, they can have any size."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for key in NPZ_KEYS:
            if f"{key}.npy" not in archive.namelist():
                continue
            with archive.open(f"{key}.npy") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                found[key] = (shape, dtype)
    return found
