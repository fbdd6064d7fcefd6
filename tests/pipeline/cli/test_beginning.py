"""`init` writes what a run reads, and nothing over what is there; `--dry-run` writes nothing at all."""

from __future__ import annotations

import ast
import runpy
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import without_progress
from edge_compress.pipeline import config as settings
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.task.recipe import read_recipe
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "cache"))


def test_a_fresh_configuration_reads_back_and_names_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--target", "phone", "--model", "net.py:factory", "--weights", "net.pt", "--data", "npz:set.npz"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "edge-compress.toml"
    assert not (tmp_path / "recipe.py").exists()
    text = (tmp_path / "edge-compress.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text) == {"target": ["phone"], "model": "net.py:factory", "weights": "net.pt", "data": "npz:set.npz"}
    keys = {settings.key(name) for name in settings.Config.__dataclass_fields__} - {"json", "quiet", "verbose"}
    written = {line.removeprefix("# ").split(" =")[0] for line in text.splitlines() if " =" in line}
    assert keys <= written
    config = settings.load(tmp_path / "edge-compress.toml", {})
    assert (config.model, config.targets) == (f"{tmp_path}/net.py:factory", ("phone",))
    assert config.evaluations == 200


@pytest.mark.parametrize("data", ["npz:sets/set.npz", "imagefolder:sets", "torchvision:CIFAR10:sets", "net.py:images", "digits"])
def test_paths_given_here_are_found_from_another_folder(data: str, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    for name in ("net.py", "net.pt", "sets/set.npz"):
        (tmp_path / name).touch()
    assert main(["init", "work/here", "--model", "net.py:factory", "--weights", "net.pt", "--data", data]) == 0
    found = settings.load(tmp_path / "work" / "here" / "edge-compress.toml", {})
    wanted = settings.load(None, {"targets": ("x86",), "model": "net.py:factory", "weights": "net.pt", "data": data})
    pairs = [(found.model, wanted.model), (str(found.weights), str(wanted.weights)), (found.data, wanted.data)]
    for one, other in pairs:
        assert one.replace("work/here/../../", "") == other


def test_a_loss_that_fails_is_found_before_anything_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    text = (tmp_path / "recipe.py").read_text(encoding="utf-8")
    (tmp_path / "recipe.py").write_text(text + "\n\ndef loss(outputs, target):\n    raise ValueError('boom')\n")
    assert main(["--target", "x86", "--recipe", "recipe.py", "--dry-run", "--quiet"]) == 2
    assert "loss(): found ValueError: boom" in capsys.readouterr().err
    assert main(["--target", "x86", "--recipe", "recipe.py", "--quiet"]) == 2
    assert "loss(): found ValueError: boom" in capsys.readouterr().err


def test_a_gate_in_points_of_accuracy_is_refused_where_it_would_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    assert main(["--target", "x86", "--recipe", "recipe.py", "--max-accuracy-drop", "2", "--dry-run"]) == 2
    assert main(["--target", "x86", "--max-drop", "1", "--max-accuracy-drop", "2", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("--max-accuracy-drop with --") == 2


def test_the_defaults_that_are_commented_out_are_the_defaults(tmp_path: Path) -> None:
    assert main(["init", "--model", "net.py:factory"]) == 0
    lines = (tmp_path / "edge-compress.toml").read_text(encoding="utf-8").splitlines()
    shown = [line[2:] for line in lines if line.startswith("# ") and " = " in line and not line.startswith("# out")]
    (tmp_path / "shown.toml").write_text("target = ['x86']\n" + "\n".join(shown), encoding="utf-8")
    plain = settings.load(None, {"targets": ("x86",)})
    shown_config = settings.load(tmp_path / "shown.toml", {"out": str(plain.out)})
    differing = set(settings.differences(shown_config, plain))
    assert differing <= {"evaluations", "finetune-epochs"}  # fewer for digits, the default data


def test_a_fresh_recipe_is_one_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "new"]) == 0
    capsys.readouterr()
    assert tomllib.loads((tmp_path / "new" / "edge-compress.toml").read_text())["recipe"] == "recipe.py"
    assert read_recipe(tmp_path / "new" / "recipe.py").model is not None
    assert main(["inspect", "--recipe", "new/recipe.py"]) == 0
    assert "samples: train" in capsys.readouterr().out
    before = sorted(tmp_path.rglob("*"))
    assert main(["--config", "new/edge-compress.toml", "--dry-run", "--quiet", "--finetune-epochs", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("network: recipe.py, ")
    assert any(line.startswith("fine-tuning: 2 epochs") for line in out)
    assert "agreement" in "\n".join(out)
    assert out[-1].startswith("in all about ")
    assert {p for p in sorted(tmp_path.rglob("*")) if "cache" not in p.parts and "__pycache__" not in p.parts} <= set(before)


@pytest.mark.parametrize("there", ["edge-compress.toml", "recipe.py"])
def test_nothing_is_written_over(there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / there).write_text("mine")
    assert main(["init"]) == 2
    assert f"{there} exists" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir() if p.is_file()] == [(there, "mine")]


def test_what_a_run_would_refuse_is_refused_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["init", "--target", "toaster"]) == 2
    assert main(["init", "--weights", "net.pt"]) == 2
    assert capsys.readouterr().err.count("edge-compress: ") == 2
    assert not list(tmp_path.glob("*.toml"))


@pytest.mark.parametrize("out", ["taken", "taken/below", "x" * 300, "/proc/run"], ids=["file", "below", "long", "proc"])
def test_a_dry_run_refuses_a_folder_that_a_run_could_not_make(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    assert main(["--target", "x86", "--dry-run", "--out", out]) == 2
    assert without_progress(capsys.readouterr().err).count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_dry_run_has_no_report_to_print(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "x86", "--dry-run", "--json"]) == 2
    assert "--dry-run with --json" in capsys.readouterr().err


def test_a_dry_run_says_that_its_folder_holds_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text('target = ["x86"]\nseed = 3\n')
    (tmp_path / "run" / "stages" / "result.json").write_text("{}")
    assert main(["--target", "x86", "--seed", "4", "--dry-run", "--out", "run"]) == 2
    assert "holds another run" in capsys.readouterr().err
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "photo.jpg").write_bytes(b"")
    assert main(["--target", "x86", "--dry-run", "--out", "photographs"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


NET = """
import torch
from torch import nn

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)


def factory():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def images():
    import numpy as np

    return dict(np.load("set.npz"))
"""


@pytest.mark.parametrize(("weights", "data"), [("net.pt", "npz:set.npz"), ("net.safetensors", "own_net.py:images")])
def test_a_recipe_is_filled_in_with_the_model_and_the_data_that_are_given(
    weights: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_net.py").write_text(NET)
    network = runpy.run_path(str(tmp_path / "own_net.py"))["factory"]()
    for parameter in network.parameters():
        parameter.data.add_(0.1)  # other than the factory's own
    torch.save(network.state_dict(), tmp_path / "net.pt")
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    pixels, labels = np.arange(100 * 16 * 16 * 3, dtype=np.uint8).reshape(100, 16, 16, 3), np.arange(100) % 4
    parts = {"train_images": pixels[:60], "train_labels": labels[:60], "test_images": pixels[60:], "test_labels": labels[60:]}
    np.savez(tmp_path / "set.npz", **parts)
    options = ["--model", "own_net.py:factory", "--weights", weights, "--data", data]
    assert main(["init", "work", "--recipe", *options]) == 0
    assert tomllib.loads((tmp_path / "work" / "edge-compress.toml").read_text()) == {"target": ["x86"], "recipe": "recipe.py"}
    recipe = read_recipe(tmp_path / "work" / "recipe.py")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(recipe.model()(images), network.eval()(images))
    found, label = recipe.datasets()["test"][1]
    assert label == labels[61]
    assert found.shape == (3, 16, 16)
    assert found[0, 0, 0] == pytest.approx((pixels[61, 0, 0, 0] / 255 - 0.4) / 0.2, abs=1e-5)  # as a run would
    capsys.readouterr()
    assert main(["inspect", "--recipe", "work/recipe.py"]) == 0
    assert "samples: train 48, search 12, test 40" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["torchvision:resnet18", "timm:resnet18", "package.nets:make", "digits-resnet"])
@pytest.mark.parametrize("data", ["imagefolder:photographs", "torchvision:CIFAR10:data", "digits"])
def test_every_kind_of_model_and_data_gives_a_recipe_that_is_python(model: str, data: str, tmp_path: Path) -> None:
    assert main(["init", "--recipe", "--model", model, "--data", data]) == 0
    tree = ast.parse((tmp_path / "recipe.py").read_text())
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} == {"model", "datasets"}


def test_a_recipe_reads_the_image_folders_that_are_there(tmp_path: Path) -> None:
    for part in ("Train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "set" / part / label).mkdir(parents=True)
            for k in range(30):
                Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / "set" / part / label / f"{k}.png")
    assert main(["init", "work", "--recipe", "--data", "imagefolder:set"]) == 0
    found = read_recipe(tmp_path / "work" / "recipe.py").datasets()
    assert {name: len(samples) for name, samples in found.items()} == {"train": 60, "test": 60}
    assert found["test"][0][0].shape == (3, 224, 224)


def test_a_factory_called_model_is_not_the_recipes_own(tmp_path: Path) -> None:
    (tmp_path / "other_net.py").write_text(NET.replace("def factory", "def model"))
    assert main(["init", "work", "--recipe", "--model", "other_net.py:model"]) == 0
    assert len(list(read_recipe(tmp_path / "work" / "recipe.py").model().children())) == 7


def test_a_package_is_imported_from_where_a_run_would_find_it(tmp_path: Path) -> None:
    (tmp_path / "some_nets").mkdir()
    (tmp_path / "some_nets" / "nets.py").write_text(NET)
    assert main(["init", "work", "--recipe", "--model", "some_nets.nets:factory"]) == 0
    assert len(list(read_recipe(tmp_path / "work" / "recipe.py").model().children())) == 7


def test_a_file_that_python_cannot_import_by_its_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "work", "--recipe", "--model", "my-net.py:factory"]) == 2
    assert "'my-net', expected a name that Python can import" in capsys.readouterr().err
