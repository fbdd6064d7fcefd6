from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.data.digits import MEAN, STD, DigitsResNet
from edge_compress.pipeline.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from edge_compress.pipeline.errors import InputError, UnavailableError
from edge_compress.pipeline.network.compute import accelerator, fast_bfloat16
from edge_compress.pipeline.network.cost import cost_of
from edge_compress.pipeline.network.weights import state_sha256, weights_file
from edge_compress.pipeline.signature import Crop
from edge_compress.pipeline.task.load import load_subject
from PIL import Image
from safetensors.torch import save_file

CONFIG = Config(targets=("x86",))

FACTORY = """
import torch
from torch import nn

def factory():
    return nn.Sequential(nn.Conv2d({channels}, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""


@pytest.fixture
def user(tmp_path: Path):
    """A user's model file, its weights and an npz data set with three classes."""

    def make(channels: int = 3, extra: str = "") -> Config:
        rng = np.random.default_rng(0)
        arrays = {}
        for part, count in (("train", 40), ("test", 12)):
            arrays[f"{part}_images"] = rng.integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)
            arrays[f"{part}_labels"] = np.arange(count) % 3
        np.savez(tmp_path / "set.npz", **arrays)
        source = FACTORY.format(channels=channels) + extra
        (tmp_path / "net.py").write_text(source)
        scope: dict[str, object] = {}
        exec(source, scope)
        save_file(scope["factory"]().state_dict(), tmp_path / "net.safetensors")
        return replace(
            CONFIG,
            model=f"{tmp_path / 'net.py'}:factory",
            weights=tmp_path / "net.safetensors",
            data=f"npz:{tmp_path / 'set.npz'}",
        )

    return make


def test_the_embedded_default_is_to_be_trained_first():
    loaded = load_subject(CONFIG)
    assert loaded.untrained
    assert loaded.subject.model == "digits-resnet"
    assert loaded.subject.data.image_shape == (1, 8, 8)
    assert len(loaded.subject.data.classes) == 10
    assert (loaded.subject.preprocess.mean, loaded.subject.preprocess.std) == (MEAN, STD)
    assert loaded.subject.preprocess.augment == "shift"  # a mirrored digit is no digit
    assert not loaded.module.training


def test_the_embedded_network_with_weights_is_a_trained_one(tmp_path):
    save_file(DigitsResNet().state_dict(), tmp_path / "weights.safetensors")
    assert not load_subject(replace(CONFIG, weights=tmp_path / "weights.safetensors")).untrained


def test_the_users_model_and_data(user):
    config = user()
    loaded = load_subject(config)
    subject = loaded.subject
    assert not loaded.untrained
    assert subject.model == "net.py:factory"
    assert subject.model_sha256 == state_sha256(loaded.module)
    assert subject.data.splits.test == len(loaded.data.test) == 12
    assert subject.data.splits.train + subject.data.splits.search == 40
    assert subject.cost == cost_of(loaded.module, torch.zeros(1, 3, 8, 8))
    assert subject.cost.macs == 6 * 6 * 4 * 27 + 12
    assert (subject.preprocess.mean, subject.preprocess.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert subject.preprocess.augment == "crop-flip"


def test_mean_and_std_come_from_the_option_then_the_model_then_a_default(user):
    grey = user(1)
    assert load_subject(grey).subject.preprocess.mean == (0.5,)
    assert load_subject(grey).subject.preprocess.std == (0.5,)
    own = user(1, "MEAN, STD = (0.25,), (0.75,)\n")
    prep = load_subject(own).subject.preprocess
    assert (prep.mean, prep.std) == ((0.25,), (0.75,))
    prep = load_subject(replace(own, mean=(0.1,))).subject.preprocess
    assert (prep.mean, prep.std) == ((0.1,), (0.75,))
    prep = load_subject(replace(user(3), std=(0.2, 0.3, 0.4))).subject.preprocess
    assert (prep.mean, prep.std) == (IMAGENET_MEAN, (0.2, 0.3, 0.4))


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """An image folder of three classes without a test split."""
    for name in "abc":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (40, 30), (i, i, i)).save(tmp_path / "pictures" / name / f"{i}.png")
    return f"imagefolder:{tmp_path / 'pictures'}"


def test_image_files_are_cropped_to_the_size_that_the_users_model_names(user, pictures):
    config = replace(user(3, "IMAGE_SIZE = 96\n"), data=pictures)
    assert load_subject(config).subject.data.image_shape == (3, 96, 96)
    chosen = load_subject(replace(config, image_size=48)).subject.data  # the option wins
    assert (chosen.image_shape, chosen.crop) == ((3, 48, 48), Crop(48, 55))
    assert load_subject(replace(user(), data=pictures)).subject.data.image_shape == (3, 224, 224)


def test_image_files_are_cropped_to_the_size_that_a_timm_model_was_made_for(user, pictures, monkeypatch):
    timm = pytest.importorskip("timm")
    config = replace(user(), data=pictures, model="timm:large_images")
    scope: dict[str, object] = {}
    exec(FACTORY.format(channels=3), scope)
    network = scope["factory"]()
    facts = {"input_size": (3, 299, 299), "crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    network.default_cfg = facts
    monkeypatch.setattr(timm, "is_model", lambda name: True)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: SimpleNamespace(**facts))
    monkeypatch.setattr(timm, "create_model", lambda name, **options: network)
    subject = load_subject(config).subject
    assert (subject.data.image_shape, subject.data.crop) == ((3, 299, 299), Crop(299, 341, "bicubic"))
    assert subject.preprocess.mean == (0.5, 0.5, 0.5)


def test_an_order_of_classes_is_refused_where_the_data_are_not_an_image_folder(user):
    with pytest.raises(InputError, match="--class-order with --data"):
        load_subject(replace(user(), class_order="natural"))


def test_an_orientation_is_refused_where_the_data_are_not_an_image_folder(user):
    with pytest.raises(InputError, match="--exif-orientation with --data"):
        load_subject(replace(user(), exif_orientation=True))


def test_the_orientation_of_image_files_is_honoured_where_it_is_asked_for_and_makes_other_data(user, pictures):
    path = Path(pictures.removeprefix("imagefolder:")) / "a" / "0.jpg"
    image = Image.new("RGB", (30, 30))
    image.paste((250, 250, 250), (0, 0, 15, 30))  # the left half, which comes up
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    plain, turned = (load_subject(replace(user(), data=pictures, image_size=8, exif_orientation=a)) for a in (False, True))
    assert plain.subject.data.sha256 != turned.subject.data.sha256  # stages of the one are not reused for the other
    halves = []
    for loaded in (plain, turned):
        source = loaded.images.train.source
        (pixels,) = source.read(np.array([source.paths.index(path)]))
        halves.append((pixels[:, :4].mean() > 200, pixels[:4].mean() > 200))
    assert halves == [(True, False), (False, True)]


def test_the_state_dict_that_is_asked_for_makes_another_subject(user):
    config = user()
    state = load_subject(config).module.state_dict()
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, config.weights.with_name("both.pt"))
    config = replace(config, weights=config.weights.with_name("both.pt"))
    default, asked = load_subject(config), load_subject(replace(config, checkpoint_key="state_dict"))
    assert torch.equal(asked.module.state_dict()["0.weight"], state["0.weight"])
    assert torch.equal(default.module.state_dict()["0.weight"], averaged["0.weight"])
    assert default.subject.model_sha256 != asked.subject.model_sha256
    assert ["--checkpoint-key" in note for note in default.notes] == [True]


def test_a_test_split_cut_from_training_images_is_told(user, pictures):
    (note,) = load_subject(replace(user(), data=pictures, image_size=8)).notes
    assert "no test split" in note
    assert "too high" in note
    assert load_subject(user()).notes == ()


@pytest.mark.parametrize(("option", "change"), [("--mean", {"mean": (0.1, 0.2)}), ("--std", {"std": (0.2,) * 4})])
def test_mean_and_std_must_fit_the_channels(user, option, change):
    with pytest.raises(InputError) as caught:
        load_subject(replace(user(), **change))
    count = len(next(iter(change.values())))
    assert str(caught.value).startswith(f"{option}: found {count} values, expected one for each of the 3 image channels")


def test_the_augmentation_can_be_chosen_and_is_checked(user):
    config = user()
    assert load_subject(replace(config, augment="none")).subject.preprocess.augment == "none"
    assert load_subject(replace(CONFIG, augment="crop-flip")).subject.preprocess.augment == "crop-flip"
    with pytest.raises(InputError, match="unknown augmentation"):
        load_subject(replace(config, augment="mixup"))


def test_model_and_data_must_fit_each_other(user):
    config = user(1)
    with pytest.raises(InputError):
        load_subject(replace(config, data="digits"))  # ten classes


def test_the_accelerator_is_what_is_asked_for_or_what_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator(replace(CONFIG, accelerator="auto")) == "cpu"
    assert accelerator(replace(CONFIG, accelerator="cpu")) == "cpu"
    with pytest.raises(UnavailableError) as caught:
        accelerator(replace(CONFIG, accelerator="cuda"))
    assert caught.value.exit_code == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert accelerator(replace(CONFIG, accelerator="auto")) == "cuda"
    assert accelerator(replace(CONFIG, accelerator="cuda")) == "cuda"
    assert accelerator(replace(CONFIG, accelerator="cpu")) == "cpu"


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("processor: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("flags : fpu avx512f\n", False),
        ("model name: avx512_bf16\nflags : avx512_bf16_not\n", False),
        ("Features : asimd\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_fast_where_the_processor_has_it(tmp_path, text, fast):
    (tmp_path / "cpuinfo").write_text(text)
    assert fast_bfloat16("cpu", tmp_path / "cpuinfo") is fast


def test_bfloat16_where_nothing_is_known():
    assert fast_bfloat16("cpu", Path("/nowhere/cpuinfo")) is False


def test_bfloat16_on_a_gpu_is_the_gpus_to_say(monkeypatch):
    for here in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, here=here: here)
        assert fast_bfloat16("cuda", Path("/nowhere/cpuinfo")) is here


def test_a_stage_keeps_its_weights_in_one_place(tmp_path):
    assert weights_file(tmp_path) == tmp_path / "weights.safetensors"
