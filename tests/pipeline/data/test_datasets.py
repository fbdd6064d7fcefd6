"""Loading data: three disjoint splits whatever the source, digests that see every change, and one line for bad input."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_compress.pipeline.data import image_folder
from edge_compress.pipeline.data.datasets import cut, load_data, search_size
from edge_compress.pipeline.data.image_folder import FolderSource
from edge_compress.pipeline.data.npz import check_counts
from edge_compress.pipeline.data.splits import ArraySource, DataSet, Split
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.signature import Crop
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def arrays(train: int = 40, test: int = 10, classes: int = 2, size: int = 6, channels: int = 3, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "train_images": rng.integers(0, 256, (train, size, size, channels), dtype=np.uint8),
        "train_labels": np.arange(train) % classes,
        "test_images": rng.integers(0, 256, (test, size, size, channels), dtype=np.uint8),
        "test_labels": np.arange(test) % classes,
    }


def saved(folder: Path, **changes: Any) -> str:
    content = {**arrays(), **changes}
    np.savez(folder / "set.npz", **{k: v for k, v in content.items() if v is not None})
    return f"npz:{folder / 'set.npz'}"


def refusal(spec: str) -> str:
    with pytest.raises(InputError) as caught:
        load_data(spec, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.found
    return message


def write_images(folder: Path, count: int, colour: int, size: tuple[int, int] = (12, 9)) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (colour, i, 0)).save(folder / f"{i:03}.png")


def image_sets(data: DataSet) -> list[set[tuple[int, int]]]:
    return [{(id(s.source), int(i)) for i in s.indices} for s in (data.train, data.search, data.test)]


# -- splits ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(train=st.integers(10, 80), test=st.integers(1, 20), classes=st.integers(2, 12), seed=st.integers(0, 2**40))
def test_three_splits_of_given_arrays_are_disjoint_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, train: int, test: int, classes: int, seed: int
) -> None:
    spec = saved(tmp_path_factory.mktemp("set"), **arrays(train, test, min(classes, train)))
    data = load_data(spec, seed=seed)
    sets = image_sets(data)
    assert sum(len(s) for s in sets) == len(set.union(*sets)) == train + test
    assert min(len(s) for s in sets) > 0
    assert data.test.indices.tolist() == list(range(test))
    assert [len(data.train), len(data.search), len(data.test)] == [
        data.info.splits.train,
        data.info.splits.search,
        data.info.splits.test,
    ]


@settings(deadline=None, max_examples=60)
@given(labels=st.lists(st.integers(0, 5), min_size=11, max_size=120), share=st.floats(0.05, 0.9), seed=st.integers(0, 2**40))
def test_cut_is_a_partition_of_the_asked_size_and_repeats_itself(labels: list[int], share: float, seed: int) -> None:
    array, count = np.asarray(labels), max(1, int(share * len(labels)))
    rest, part = cut(array, count, seed)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(labels)))
    assert len(part) == count
    again = cut(array, count, seed)
    assert all((a == b).all() for a, b in zip((rest, part), again, strict=True))


def test_cut_keeps_the_shares_of_the_classes_where_it_can() -> None:
    labels = np.repeat([0, 1, 2], [200, 80, 20])
    _, part = cut(labels, 30, 3)
    assert np.bincount(labels[part]).tolist() == [20, 8, 2]
    assert (np.diff(part) < 0).any()  # shuffled


@pytest.mark.parametrize(("train", "expected"), [(50_000, 5000), (200_000, 5000), (1437, 287), (4000, 500), (20, 4), (10, 2)])
def test_search_split_is_a_tenth_and_of_small_sets_a_fifth(train: int, expected: int) -> None:
    assert search_size(train) == expected


def test_digits_are_the_scans_and_their_test_images_do_not_depend_on_the_seed() -> None:
    from sklearn.datasets import load_digits

    first, other = load_data("digits", seed=1), load_data("digits", seed=2)
    assert first.info.splits == other.info.splits
    assert (first.info.splits.train, first.info.splits.search, first.info.splits.test) == (1151, 287, 359)
    assert (first.test.indices == other.test.indices).all()
    assert set(first.search.indices.tolist()) != set(other.search.indices.tolist())
    assert first.info.sha256 == other.info.sha256
    sets = image_sets(first)
    assert len(set.union(*sets)) == sum(len(s) for s in sets) == 1797
    scans = load_digits()
    pixels = first.search.read(np.arange(5))
    assert pixels.shape == (5, 8, 8, 1)
    assert np.abs(pixels[..., 0] / 255 * 16 - scans.images[first.search.indices[:5]]).max() < 0.05
    assert (first.search.labels == scans.target[first.search.indices]).all()
    assert pixels.max() == 255


def test_classes_that_a_split_lacks_are_told(tmp_path: Path) -> None:
    """Of 20 images of ten classes, four make the search split; two of the classes have no test image."""
    content = arrays(train=20, test=8) | {"train_labels": np.arange(20) % 10, "test_labels": np.arange(8)}
    data = load_data(saved(tmp_path, **content, classes=np.array([f"c{i}" for i in range(10)])), seed=0)
    notes = {name: note for note in data.notes for name in ("training", "search", "test") if f"the {name} split" in note}
    lacking = sorted({*range(10)} - {*data.search.labels.tolist()})
    shown = f"{', '.join(f'c{i}' for i in lacking[:5])} and {len(lacking) - 5} more"
    assert notes["search"].startswith(f"Classes without an image in the search split (of 4): {len(lacking)} of 10 ({shown}).")
    assert notes["test"].startswith("Classes without an image in the test split (of 8): 2 of 10 (c8, c9).")


def test_classes_without_any_image_are_told_once(tmp_path: Path) -> None:
    (note,) = load_data(saved(tmp_path, classes=np.array(["cat", "dog", "never seen"])), seed=0).notes
    where = "the training split (of 32), the search split (of 8), the test split (of 10)"
    assert note.startswith(f"Classes without an image in {where}: 1 of 3 (never seen).")
    assert load_data(saved(tmp_path), seed=0).notes == ()


def test_split_reads_in_its_own_order_and_head_is_its_beginning() -> None:
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    split = Split(ArraySource(images, np.arange(20) * 10), np.array([7, 3, 11, 5]))
    assert split.read(np.array([2, 0])).ravel().tolist() == [11, 7]
    assert split.labels.tolist() == [70, 30, 110, 50]
    assert len(split.head(2)) == 2
    assert split.head(2).read(np.arange(2)).ravel().tolist() == [7, 3]
    assert len(split.head(9)) == 4


# -- npz ---------------------------------------------------------------------------------------------------------------


def test_npz_gives_its_pixels_labels_and_class_names(tmp_path: Path) -> None:
    content = arrays()
    data = load_data(saved(tmp_path, classes=np.array(["cat", "dog", "never seen"])), seed=0)
    assert data.info.name == "npz:set.npz"
    assert data.info.classes == ("cat", "dog", "never seen")
    assert data.info.image_shape == (3, 6, 6)
    assert (data.test.read(np.arange(10)) == content["test_images"]).all()
    assert (data.train.read(np.array([4])) == content["train_images"][data.train.indices[4]]).all()
    assert (data.search.labels == content["train_labels"][data.search.indices]).all()


def test_digest_sees_one_pixel_and_one_label_but_not_the_seed(tmp_path: Path) -> None:
    content = arrays()
    digests = [load_data(saved(tmp_path), seed=s).info.sha256 for s in (0, 1)]
    content["test_images"][3, 2, 1, 0] ^= 1
    digests.append(load_data(saved(tmp_path, test_images=content["test_images"]), seed=0).info.sha256)
    content["train_labels"][3] ^= 1
    digests.append(load_data(saved(tmp_path, train_labels=content["train_labels"]), seed=0).info.sha256)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def with_nan() -> np.ndarray:
    images = np.zeros((40, 6, 6, 3), np.float32)
    images[[3, 5], 0, 0, 0] = np.nan
    return images


BAD_ARRAYS = [
    ({"test_labels": None}, "no test_labels"),
    ({"train_images": np.array([np.zeros((2, 2)), None], object)}, "train_images: found an object array"),
    ({"train_images": with_nan()}, "train_images: found float32 with NaN or infinity in 2 of 40 images, expected uint8"),
    ({"train_images": np.zeros((40, 6, 6, 3), np.float32)}, r"train_images: found float32.*\* 255"),
    ({"train_images": np.zeros((40, 6, 6, 3), np.int32)}, "found int32, expected uint8"),
    ({"train_images": np.zeros((40, 6, 6), np.uint8)}, r"found shape \(40, 6, 6\).*last axis"),
    ({"train_images": np.zeros((40, 3, 6, 6), np.uint8)}, "channels first.*transpose"),
    ({"train_images": np.zeros((0, 6, 6, 3), np.uint8), "train_labels": np.zeros(0, int)}, "no image"),
    ({"test_images": np.zeros((0, 6, 6, 3), np.uint8), "test_labels": np.zeros(0, int)}, "test_images.*no image"),
    ({"test_images": np.zeros((10, 7, 6, 3), np.uint8)}, r"test_images: found \(7, 6, 3\).*expected \(6, 6, 3\)"),
    ({"train_labels": np.arange(39) % 2}, "train_labels: found 39 labels for 40 images"),
    ({"train_labels": np.arange(40) % 2 - 1}, "train_labels: found label -1 .20 out of range"),
    ({"train_labels": (np.arange(40) % 2).astype(float)}, "train_labels: found float64"),
    ({"train_labels": np.full(40, 2**60)}, "out of range"),
    ({"test_labels": np.full(10, 2)}, r"test_labels: found label 2 .*expected integers 0\.\.1"),
    ({"classes": np.array(["only"])}, "found label 1"),
    ({"classes": np.array([["a", "b"]])}, "classes: found"),
    ({"train_labels": np.zeros(40, int), "test_labels": np.zeros(10, int)}, "found 1 class"),
    ({"train_images": np.zeros((9, 6, 6, 3), np.uint8), "train_labels": np.arange(9) % 2}, "too few images for three splits"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS, ids=[m[:40] for _, m in BAD_ARRAYS])
def test_bad_arrays_are_refused_with_what_was_found(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(saved(tmp_path, **changes)))


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(f"npz:{tmp_path / 'absent.npz'}")
    assert "found a folder" in refusal(f"npz:{tmp_path}")
    (tmp_path / "text.npz").write_text("images")
    assert "not an .npz" in refusal(f"npz:{tmp_path / 'text.npz'}")
    spec = saved(tmp_path)
    damaged = bytearray((tmp_path / "set.npz").read_bytes())
    damaged[300:330] = b"\xff" * 30
    (tmp_path / "set.npz").write_bytes(damaged)
    assert "damaged" in refusal(spec)


def method(number: int, flags: int = 0) -> Callable[[Path], None]:
    """Another compression method, and flags, in both places where a zip file has them."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            for found in re.finditer(re.escape(signature), bytes(data)):
                struct.pack_into("<HH", data, found.start() + at, flags, number)
        path.write_bytes(data)

    return change


def damaged_lzma(path: Path) -> None:
    arrays_ = arrays()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays_.items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(f"{name}.npy", content.getvalue())
    data = bytearray(path.read_bytes())
    data[60:400] = b"\xa5" * 340
    path.write_bytes(data)


def header(text: str) -> Callable[[Path], None]:
    """The header of `train_images` replaced."""

    def change(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        written = text.encode("latin1").ljust(118) + b"\n"
        contents["train_images.npy"] = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(written)) + written + bytes(100)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)

    return change


DAMAGE = {
    "deflate64": method(9),
    "zstandard": method(93),
    "AES": method(99),
    "encrypted": method(0, flags=1),
    "damaged LZMA": damaged_lzma,
    "header without its end": header("{'descr': '|u1', 'fortran_order': False, 'shape': (40, 6, 6, 3"),
    "header of brackets": header("{'descr': '|u1', 'fortran_order': False, 'shape': " + "(" * 5000),
    "header of signs": header("{'descr': '|u1', 'fortran_order': False, 'shape': " + "-" * 9000 + "1}"),
    "header of no shape": header("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 1 << 70)}"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_archives_that_cannot_be_read_are_refused_whatever_the_libraries_raise(tmp_path: Path, kind: str) -> None:
    spec = saved(tmp_path)
    DAMAGE[kind](tmp_path / "set.npz")
    assert "found a file that is not an .npz, or a damaged one" in refusal(spec)
    check_counts(spec)  # leaves it for the reader to name


def test_labels_that_are_not_as_many_as_the_images_are_found_without_reading_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("it was read"))
    check_counts(saved(tmp_path))
    for part, count in (("train", 40), ("test", 10)):
        with pytest.raises(InputError, match=f"{part}_labels: found 7 labels for {count} images, expected as many"):
            check_counts(saved(tmp_path, **{f"{part}_labels": np.zeros(7, int)}))
    check_counts(saved(tmp_path, test_labels=None, train_labels=np.int64(3)))
    check_counts(f"npz:{tmp_path / 'absent.npz'}")


def test_counts_are_compared_without_pytorch(tmp_path: Path) -> None:
    code = f"import sys; from edge_compress.pipeline.data.npz import check_counts; check_counts({saved(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


@pytest.mark.parametrize("spec", ["cifar", "npz:", "http://x", "", "net.txt:f"])
def test_unknown_schemes_list_the_known_ones(spec: str) -> None:
    assert "npz:FILE" in refusal(spec)


# -- a user's factory, torchvision -------------------------------------------------------------------------------------


def test_a_factory_gives_the_same_data_as_the_npz_with_its_arrays(tmp_path: Path) -> None:
    spec = saved(tmp_path)
    (tmp_path / "mine.py").write_text(
        f"import numpy as np\ndef make():\n    return dict(np.load({str(tmp_path / 'set.npz')!r}))\n"
    )
    made, read = load_data(f"{tmp_path / 'mine.py'}:make", seed=4), load_data(spec, seed=4)
    assert made.info.name == "mine.py:make"
    assert made.info.sha256 == read.info.sha256
    assert (made.train.indices == read.train.indices).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [("raise ValueError('no disk')", "ValueError: no disk"), ("return 3", "found a int"), ("return {}", "found no train_images")],
)
def test_a_factory_that_fails_is_named_with_its_own_words(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"def make():\n    {body}\n")
    assert message in refusal(f"{tmp_path / 'mine.py'}:make")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2], [3]]", "ValueError: setting an array element with a sequence"),
        ("torch.zeros(40, 6, 6, 3, device='meta')", "TypeError: can't convert meta"),
        ("torch.zeros(3).to_sparse()", "expected arrays; return plain numpy arrays"),
    ],
    ids=["ragged", "meta", "sparse"],
)
def test_a_factory_that_gives_no_arrays_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"import torch\ndef make():\n    return {{'train_images': {content}}}\n")
    assert message in refusal(f"{tmp_path / 'mine.py'}:make")


@pytest.mark.parametrize("error", ["KeyError('x')", "GeneratorExit()", "SystemExit(3)", "MemoryError()"])
@pytest.mark.parametrize("where", ["__getitem__", "__contains__"])
def test_whatever_a_mapping_of_the_users_raises_is_one_line(tmp_path: Path, error: str, where: str) -> None:
    (tmp_path / "mine.py").write_text(
        f"class Data(dict):\n    def {where}(self, key):\n        raise {error}\ndef make():\n    return Data(train_images=0)\n"
    )
    assert f"mine.py:make: found {error.partition('(')[0]}" in refusal(f"{tmp_path / 'mine.py'}:make")


def test_class_names_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"import numpy as np\ndef make():\n    return dict(np.load({str(tmp_path / 'set.npz')!r}), classes=['a', '\\udcff'])\n"
    )
    saved(tmp_path)
    assert r"classes: found '\udcff', expected text" in refusal(f"{tmp_path / 'mine.py'}:make")


@pytest.mark.parametrize("spec", ["npz:{}/x.npz", "imagefolder:{}/x", "torchvision:CIFAR10:{}/x", "{}/x.py:make"])
def test_the_home_of_nobody_is_refused(spec: str) -> None:
    assert "expected the home folder of a user of this machine" in refusal(spec.format("~nobody-of-this-name"))


def test_torchvision_says_what_is_missing_where(tmp_path: Path) -> None:
    assert re.search(rf"cannot read CIFAR10.*its files in {tmp_path}.*download=True", refusal(f"torchvision:CIFAR10:{tmp_path}"))
    assert "imagefolder" in refusal(f"torchvision:NoSuchSet:{tmp_path}")
    assert "imagefolder" in refusal("torchvision:CIFAR10")


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000)])
def test_a_strip_of_an_image_is_not_scaled_to_millions_of_pixels_that_are_cut_away(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled: list[int] = []
    resize = Image.Image.resize

    def recorded(image: Image.Image, size: Any, *rest: Any, **more: Any) -> Image.Image:
        scaled.append(size[0] * size[1])
        return resize(image, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    Image.new("RGB", size, (7, 8, 9)).save(tmp_path / "strip.png")
    source = FolderSource((tmp_path / "strip.png",), np.zeros(1, np.int64), Crop(24, 32))
    (image,) = source.read(np.array([0]))
    assert (image == (7, 8, 9)).all()
    assert max(scaled) <= 10 * 32 * 32


def test_the_middle_of_a_strip_is_where_it_was(tmp_path: Path) -> None:
    """Against the way of ordinary images: all is scaled, then cut."""
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (20, 300, 3), dtype=np.uint8)  # 15 times as wide as high
    Image.fromarray(pixels).save(tmp_path / "strip.png")
    source = FolderSource((tmp_path / "strip.png",), np.zeros(1, np.int64), Crop(28, 32))
    (image,) = source.read(np.array([0]))
    whole = transforms.CenterCrop(28)(transforms.Resize(32)(Image.fromarray(pixels)))
    assert np.abs(image.astype(int) - np.asarray(whole)).max() <= 1


def test_arrays_that_exceed_the_memory_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 20, 4, 3)})
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            archive.writestr(f"{name}.npy", header.getvalue())
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("it was read"))
    assert "arrays that do not fit in the memory" in refusal(f"npz:{tmp_path / 'set.npz'}")


def test_damaged_files_of_torchvision_are_one_line(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x09" + bytes(40))
    assert "cannot read MNIST" in refusal(f"torchvision:MNIST:{tmp_path}")


def test_torchvision_reads_the_files_of_a_data_set_class(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("t10k", 5)):  # MNIST's own format: magic number and sizes, big-endian, then bytes
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        header = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(n, dtype=np.uint8) % 10
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, n], ">i4").tobytes() + labels.tobytes())
    data = load_data(f"torchvision:MNIST:{tmp_path}", seed=0)
    assert data.info.image_shape == (1, 28, 28)
    assert len(data.info.classes) == 10
    assert (data.test.read(np.arange(5))[..., 0] == images).all()
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4]


# -- image folders -----------------------------------------------------------------------------------------------------


def test_image_folder_with_train_and_val_crops_the_centre_of_the_resized_image(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("val", 3)):
        write_images(tmp_path / part / "a", count, 50)
        write_images(tmp_path / part / "b", count, 200)
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[:, 28:36] = 250  # the centre
    Image.fromarray(wide).save(tmp_path / "val" / "a" / "000.png")
    data = load_data(f"imagefolder:{tmp_path}", seed=0, crop=Crop(14, 16))
    assert data.info.image_shape == (3, 14, 14)
    assert data.info.classes == ("a", "b")
    assert (data.info.splits.train, data.info.splits.search, data.info.splits.test) == (16, 4, 6)
    pixels = data.test.read(np.arange(6))
    assert (pixels[0, :, 3:11] == 250).all()  # 14 * 256 / 224 = 16: not scaled, 7 to each side of the centre
    assert (pixels[0, :, [0, 1, 12, 13]] == 0).all()
    assert pixels[1, 5, 5].tolist() == [50, 1, 0]
    assert pixels[4, 5, 5].tolist() == [200, 1, 0]
    train = data.train.read(np.arange(16))
    assert (train[:, 0, 0, 0] == np.where(data.train.labels == 0, 50, 200)).all()


def test_image_files_are_those_of_torchvision_and_one_more() -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(image_folder.SUFFIXES) == {*IMG_EXTENSIONS, ".jfif"}


def test_image_folder_defaults_to_224_pixels(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 8, 1)
    write_images(tmp_path / "b", 8, 2)
    data = load_data(f"imagefolder:{tmp_path}", seed=0)
    assert data.train.read(np.array([0])).shape == (1, 224, 224, 3)


def test_an_image_folder_is_resized_and_cropped_as_the_network_was_evaluated(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (50, 80, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    for crop, method in ((Crop(20, 25, "bicubic"), Image.Resampling.BICUBIC), (Crop(24, 30), Image.Resampling.BILINEAR)):
        data = load_data(f"imagefolder:{tmp_path}", seed=0, crop=crop)
        with Image.open(tmp_path / "a" / "0.png") as image:
            left, top = round((crop.resize * 80 / 50 - crop.size) / 2), round((crop.resize - crop.size) / 2)
            whole = np.asarray(image.resize((int(crop.resize * 80 / 50), crop.resize), method))
        square = whole[top : top + crop.size, left : left + crop.size]
        assert (Split(data.train.source, np.arange(1)).read(np.arange(1))[0] == square).all()
        assert (data.info.image_shape, data.info.crop) == ((3, crop.size, crop.size), crop)


def test_only_a_test_split_that_was_given_is_taken_for_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "both" / "train" / name, 10, 1)
        write_images(tmp_path / "both" / "test" / name, 3, 1)
        write_images(tmp_path / "flat" / name, 10, 1)
    assert load_data(f"imagefolder:{tmp_path / 'both'}", seed=0).info.test_given
    assert not load_data(f"imagefolder:{tmp_path / 'flat'}", seed=0).info.test_given
    assert load_data("digits", seed=0).info.test_given  # always the same images, which the embedded network never trains on


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Images of the classes 1, 2, 9 and 10, each of the colour of its number."""
    for name in ("1", "2", "9", "10"):
        write_images(tmp_path / "numbered" / name, 8, int(name))
    return f"imagefolder:{tmp_path / 'numbered'}"


def test_class_folders_are_in_the_order_that_was_asked_for(numbered: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("9\n\n10 \n2\n7\n1\n")
    for asked, expected in (
        ("text", ("1", "10", "2", "9")),
        ("natural", ("1", "2", "9", "10")),
        (str(tmp_path / "names.txt"), ("9", "10", "2", "7", "1")),
    ):
        data = load_data(numbered, seed=0, crop=Crop(4, 5), order=image_folder.class_order(asked))
        assert data.info.classes == expected
        colours = data.train.read(np.arange(len(data.train)))[:, 0, 0, 0]
        assert [int(expected[label]) for label in data.train.labels] == colours.tolist()
        assert any("--class-order natural" in note for note in data.notes) == (asked == "text")


def test_names_without_numbers_need_no_word_on_their_order(tmp_path: Path) -> None:
    for name in ("cat", "dog", "n01", "n02"):
        write_images(tmp_path / name, 8, 1)
    assert load_data(f"imagefolder:{tmp_path}", seed=0).notes == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "no class"), ("1\n2\n1\n", "'1' twice"), ("1\n2\n9\n", "a folder '10'"), ("\udcff", "UnicodeDecodeError")],
)
def test_a_file_of_class_names_that_does_not_fit_is_refused(numbered: str, tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "names.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=re.escape(complaint)):
        load_data(numbered, seed=0, order=image_folder.class_order(str(tmp_path / "names.txt")))
    with pytest.raises(InputError, match="text or natural"):
        image_folder.class_order(str(tmp_path / "absent.txt"))


def test_flat_image_folder_is_split_by_seed_and_stays_disjoint(tmp_path: Path) -> None:
    for name, colour in (("x", 10), ("y", 20)):
        write_images(tmp_path / name, 20, colour)
    first, again, other = (load_data(f"imagefolder:{tmp_path}", seed=s, crop=Crop(4, 5)) for s in (0, 0, 1))
    assert first.info == again.info
    assert (first.train.indices == again.train.indices).all()
    assert set(first.test.indices.tolist()) != set(other.test.indices.tolist())
    assert np.bincount(first.test.labels).tolist() == [4, 4]
    sets = image_sets(first)
    assert len(set.union(*sets)) == sum(len(s) for s in sets) == 40


def test_image_folder_digest_sees_contents_and_names(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 10, 1)
    write_images(tmp_path / "b", 10, 2)
    digests = [load_data(f"imagefolder:{tmp_path}", seed=0).info.sha256]
    Image.new("RGB", (12, 9), (9, 9, 9)).save(tmp_path / "a" / "004.png")
    digests.append(load_data(f"imagefolder:{tmp_path}", seed=0).info.sha256)
    (tmp_path / "a" / "005.png").rename(tmp_path / "b" / "905.png")
    digests.append(load_data(f"imagefolder:{tmp_path}", seed=1).info.sha256)
    assert len(set(digests)) == 3
    assert load_data(f"imagefolder:{tmp_path}", seed=0).info.sha256 == digests[-1]


def test_image_folder_is_not_decoded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "a", 10, 1)
    write_images(tmp_path / "b", 10, 2)
    decoded: list[Path] = []
    decode = image_folder._decode
    monkeypatch.setattr(image_folder, "_decode", lambda path, *how: (decoded.append(path), decode(path, *how))[1])
    data = load_data(f"imagefolder:{tmp_path}", seed=0, crop=Crop(8, 9))
    assert decoded == []
    data.search.read(np.array([1, 0]))
    assert len(decoded) == 2


def test_bad_image_folders_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(f"imagefolder:{tmp_path / 'absent'}")
    assert "class" in refusal(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "set" / "train" / "a", 10, 1)
    write_images(tmp_path / "set" / "train" / "b", 10, 2)
    assert "train without test" in refusal(f"imagefolder:{tmp_path / 'set'}")
    write_images(tmp_path / "set" / "test" / "a", 2, 1)
    assert "2 classes in train, 1 in test, 'b' in one only" in refusal(f"imagefolder:{tmp_path / 'set'}")
    (tmp_path / "set" / "test" / "b").mkdir()
    assert "images" in refusal(f"imagefolder:{tmp_path / 'set'}")


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 10, 1)
    write_images(tmp_path / "b", 10, 2)
    whole = (tmp_path / "b" / "003.png").read_bytes()
    (tmp_path / "b" / "003.png").write_bytes(whole[:45])  # its header is there, its pixels are not
    data = load_data(f"imagefolder:{tmp_path}", seed=0, crop=Crop(8, 9))
    everything = Split(data.train.source, np.arange(20))
    with pytest.raises(InputError, match=r"b/003\.png"):
        everything.read(np.arange(20))
    (tmp_path / "b" / "003.png").write_bytes(b"no image")
    assert "b/003.png" in refusal(f"imagefolder:{tmp_path}")  # before anything is computed


@pytest.mark.parametrize("kind", ["pipe", "device", "dangling", "loop", "endless"])
@pytest.mark.timeout(60)
def test_what_is_called_an_image_and_is_no_file_is_refused_before_it_is_read(tmp_path: Path, kind: str) -> None:
    write_images(tmp_path / "a", 10, 1)
    write_images(tmp_path / "b", 10, 2)
    odd = tmp_path / "b" / "odd.png"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        places = {"device": "/dev/zero", "dangling": tmp_path / "gone", "loop": odd, "endless": "/proc/self/mem"}
        odd.symlink_to(places[kind])
    assert "b/odd.png" in refusal(f"imagefolder:{tmp_path}")


def test_hidden_folders_other_names_of_the_splits_and_jfif_are_understood(tmp_path: Path) -> None:
    for part, count in (("Train", 10), ("validation", 3)):
        for label in "ab":
            write_images(tmp_path / part / label, count, ord(label))
        write_images(tmp_path / part / ".ipynb_checkpoints", 1, 9)
    Image.fromarray(np.full((9, 12, 3), 7, np.uint8)).save(tmp_path / "Train" / "a" / "more.jfif", "jpeg")
    Image.fromarray(np.full((9, 12, 3), 7, np.uint8)).save(tmp_path / "Train" / "a" / "._more.png")
    data = load_data(f"imagefolder:{tmp_path}", seed=0, crop=Crop(8, 9))
    assert data.info.classes == ("a", "b")
    assert len(data.train) + len(data.search) == 21
    assert len(data.test) == 6


def two_classes(folder: Path, count: int = 10) -> str:
    for name in "ab":
        write_images(folder / name, count, ord(name))
    return f"imagefolder:{folder}"


def test_copies_in_hidden_folders_are_no_images_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    spec = two_classes(tmp_path)
    before = load_data(spec, seed=0)
    for hidden in (".ipynb_checkpoints", "a/.ipynb_checkpoints", "b/deep/.cache/deeper", "b/__MACOSX"):
        write_images(tmp_path / hidden, 2, 9)
    for name in ("a/one.gif", "b/two.GIF", "a/.DS_Store", "b/._003.png", "a/labels", "b/odd.\udcff"):
        (tmp_path / name).write_bytes(b"")
    data = load_data(spec, seed=0)
    assert data.info == before.info  # its digest too
    assert [len(data.train), len(data.search), len(data.test)] == [len(before.train), len(before.search), len(before.test)]
    assert (data.test.indices == before.test.indices).all()
    assert before.notes == ()
    files, folders = "2 .gif, 2 hidden, 1 .\\udcff, 1 without a suffix", "2 .ipynb_checkpoints, 1 .cache, 1 __MACOSX"
    left_out = f"files that are no images by their names ({files}) and hidden folders ({folders})"
    assert data.notes == (f"Left out of the image folder: {left_out}.",)


def test_many_kinds_of_files_that_are_no_images_take_one_line(tmp_path: Path) -> None:
    spec = two_classes(tmp_path)
    for i in range(20):
        (tmp_path / "a" / f"scan.{i:03}").write_bytes(b"")
    (note,) = load_data(spec, seed=0).notes
    assert note.endswith("(1 .000, 1 .001, 1 .002, 1 .003, 16 others).")


def test_images_are_in_the_order_of_torchvisions_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in ("a", "a/x", "a/x-y", "a/x/z", "b"):
        write_images(tmp_path / name, 5, len(name))
    (tmp_path / "elsewhere").mkdir()
    write_images(tmp_path / "elsewhere" / "c", 5, 3)
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / "set" / name)
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere" / "c")  # a class folder may be a link, and what is in it
    (tmp_path / "set" / "a" / "linked").symlink_to("../b")
    source = load_data(f"imagefolder:{tmp_path / 'set'}", seed=0).train.source
    assert isinstance(source, FolderSource)
    expected = ImageFolder(str(tmp_path / "set")).samples
    assert [(str(path), label) for path, label in zip(source.paths, source.labels.tolist(), strict=True)] == expected


@pytest.mark.parametrize("target", [".", "..", "../..", "{}", "/", "../b"])
@pytest.mark.timeout(60)
def test_a_link_to_a_folder_that_it_is_in_is_refused(tmp_path: Path, target: str) -> None:
    spec = two_classes(tmp_path / "set")
    (tmp_path / "set" / "b" / "deep").mkdir()
    link = tmp_path / "set" / "a" / "again"
    link.symlink_to(target.format(tmp_path / "set"))
    if target == "../b":  # each leads to the other
        (tmp_path / "set" / "b" / "deep" / "back").symlink_to("../../a")
    assert re.search(r"folder \S+: found a link to \S+, which it is in, expected images; remove it", refusal(spec))


def test_a_class_folder_that_is_a_link_to_the_whole_is_refused(tmp_path: Path) -> None:
    spec = two_classes(tmp_path)
    (tmp_path / "c").symlink_to(".")
    assert f"folder {tmp_path / 'c'}: found a link" in refusal(spec)


def test_a_class_folder_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    spec = two_classes(tmp_path)
    os.rename(tmp_path / "b", bytes(tmp_path / "b") + b"\xff")  # noqa: PTH104
    assert r"found a class folder 'b\udcff', expected a UTF-8 name; rename it" in refusal(spec)


def test_a_data_folder_whose_name_is_not_utf8_has_a_name_that_can_be_written(tmp_path: Path) -> None:
    real = tmp_path / os.fsdecode(b"set\xff")
    two_classes(real)
    (tmp_path / "link").symlink_to(real)
    data = load_data(f"imagefolder:{tmp_path / 'link'}", seed=0, crop=Crop(4, 5))
    assert data.info.name == r"imagefolder:set\udcff"
    assert len(data.train.read(np.arange(2))) == 2


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = two_classes(tmp_path)
    (tmp_path / "b" / "closed").mkdir()
    scan = os.scandir

    def denied(folder: Path) -> Any:
        if Path(folder).name == "closed":  # root may read everything
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", denied)
    assert re.search("Permission denied: .*b/closed", refusal(spec))


def turned(folder: Path, orientation: int, suffix: str) -> Path:
    """An image whose left half is bright before it is turned, and whose orientation says how it is to be turned."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 250
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(folder / f"turned.{suffix}", exif=exif)
    return folder / f"turned.{suffix}"


def test_images_that_carry_an_orientation_and_classes_that_are_numbers_are_told(tmp_path: Path) -> None:
    for label in range(11):
        write_images(tmp_path / str(label), 8, label)
    turned(tmp_path / "3", 6, "jpg")
    told, numbers = load_data(f"imagefolder:{tmp_path}", seed=0, crop=Crop(8, 9)).notes
    assert told.startswith("1 of 89 images carry an EXIF orientation, which is not applied")
    assert told.endswith("give --exif-orientation.")
    assert "0, 1, 10, 2 are the classes 0 to 3" in numbers


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_orientation_is_applied_where_that_is_asked_for_and_not_otherwise(tmp_path: Path, suffix: str) -> None:
    spec = two_classes(tmp_path)
    path = turned(tmp_path / "a", 6, suffix)  # to be turned a quarter clockwise: its left half comes up
    found = {}
    for asked in (False, True):
        data = load_data(spec, seed=0, crop=Crop(16, 16, exif_orientation=asked))
        source = data.train.source
        assert isinstance(source, FolderSource)
        (image,) = source.read(np.array([source.paths.index(path)]))
        found[asked] = (image[..., 0] > 125, data.info.sha256, data.notes)
    assert found[False][0].sum(1).tolist() == pytest.approx([8] * 16, abs=1)
    assert found[False][0][:, :7].all()
    assert found[True][0][:7].all()
    assert not found[True][0][9:].any()
    assert found[False][1] != found[True][1]  # other pixels, other data
    assert found[True][2] == ("1 of 21 images carry an EXIF orientation, which is applied.",)


@pytest.mark.parametrize("orientation", [0, 1, 9])
def test_images_that_are_upright_are_the_same_with_and_without_their_orientation(tmp_path: Path, orientation: int) -> None:
    spec = two_classes(tmp_path)
    turned(tmp_path / "a", orientation, "jpg")
    plain, asked = (load_data(spec, seed=0, crop=Crop(8, 9, exif_orientation=applied)) for applied in (False, True))
    assert plain.info == replace(asked.info, crop=plain.info.crop)  # the same pixels
    assert plain.notes == asked.notes == ()


@pytest.mark.parametrize(("kind", "suffix"), [("I;16", "png"), ("I;16B", "tif")])
def test_sixteen_bit_grey_keeps_its_shades(kind: str, suffix: str, tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(">u2" if kind == "I;16B" else "<u2")
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(10):
            Image.fromarray(shades).save(tmp_path / label / f"{i}.{suffix}")
    images = load_data(f"imagefolder:{tmp_path}", seed=0, crop=Crop(64, 64)).test.read(np.arange(4))
    assert abs(float(images.mean()) - 127.5) < 2
    assert len(np.unique(images)) > 200


def test_pixels_of_no_known_range_are_refused(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(10):
            Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / label / f"{i}.tif")
    data = load_data(f"imagefolder:{tmp_path}", seed=0, crop=Crop(8, 8))
    with pytest.raises(InputError, match="no known range"):
        data.test.read(np.arange(4))


def test_data_without_its_scheme_is_told_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean npz:own\.npz\?"):
        load_data("own.npz", seed=0)
    with pytest.raises(InputError, match="did you mean imagefolder:"):
        load_data(str(tmp_path), seed=0)
    for other in ("nzp:own.npz", ""):
        with pytest.raises(InputError, match="see --help"):
            load_data(other, seed=0)
