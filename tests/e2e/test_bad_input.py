"""Wrong input is exit code 2 and one line that says what was wrong; nothing is computed for it and nothing written over."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import user_net
from cli_runs import COMMAND, USER_NET, Finished, Workshop, snapshot
from safetensors.torch import load_file, save_file

Call = Callable[[list[str]], Finished]
Options = dict[str, object]
Make = Callable[[Workshop, Path], Options]  # writes what it needs into a folder, and gives the options that are wrong


def npz(folder: Path, workshop: Workshop, **changed: Any) -> Options:
    """The digits with some arrays replaced, as options."""
    with np.load(workshop.npz) as whole:
        arrays = dict(whole) | changed
    np.savez(folder / "wrong.npz", **{name: array for name, array in arrays.items() if array is not None})
    return {"data": f"npz:{folder / 'wrong.npz'}"}


def factory(name: str) -> Options:
    return {"model": f"{USER_NET}:{name}"}


def no_model_file(workshop: Workshop, folder: Path) -> Options:
    return {"model": f"{folder / 'none.py'}:projected"}


def no_weights_file(workshop: Workshop, folder: Path) -> Options:
    return {"weights": folder / "none.safetensors"}


def no_data_file(workshop: Workshop, folder: Path) -> Options:
    return {"data": f"npz:{folder / 'none.npz'}"}


def other_weights(workshop: Workshop, folder: Path) -> Options:
    return {"weights": workshop.weights("padded")}


def nan_weights(workshop: Workshop, folder: Path) -> Options:
    state = load_file(workshop.weights("projected"))
    state["layer1.conv1.weight"][0] = float("nan")
    save_file(state, folder / "nan.safetensors")
    return {"weights": folder / "nan.safetensors"}


def fewer_classes(workshop: Workshop, folder: Path) -> Options:
    with np.load(workshop.npz) as whole:
        few = {part: whole[f"{part}_labels"] < 7 for part in ("train", "test")}
        arrays = {f"{p}_{what}": whole[f"{p}_{what}"][few[p]] for p in few for what in ("images", "labels")}
    return npz(folder, workshop, classes=None, **arrays)


def fewer_classes_for_a_sized_network(workshop: Workshop, folder: Path) -> Options:
    return fewer_classes(workshop, folder) | factory("sized")


def empty_data(workshop: Workshop, folder: Path) -> Options:
    return npz(folder, workshop, train_images=np.zeros((0, 8, 8, 1), np.uint8), train_labels=np.zeros(0, np.int64))


def nan_images(workshop: Workshop, folder: Path) -> Options:
    images = np.zeros((1437, 8, 8, 1), np.float32)
    images[5] = np.nan
    return npz(folder, workshop, train_images=images)


def labels_out_of_range(workshop: Workshop, folder: Path) -> Options:
    with np.load(workshop.npz) as whole:
        labels = whole["test_labels"].copy()
    labels[3] = 10
    return npz(folder, workshop, test_labels=labels)


def labels_of_other_images(workshop: Workshop, folder: Path) -> Options:
    return npz(folder, workshop, train_labels=np.zeros(7, np.int64))


def meta_network(workshop: Workshop, folder: Path) -> Options:
    (folder / "net.py").write_text(
        "import torch\n\ndef make():\n    with torch.device('meta'):\n        return torch.nn.Linear(64, 10)\n"
    )
    return {"model": f"{folder / 'net.py'}:make"}


def exported_network(workshop: Workshop, folder: Path) -> Options:
    (folder / "net.py").write_text(
        "import torch\nfrom torch import nn\n\ndef make():\n    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()\n"
        "    return torch.export.export(net, (torch.zeros(1, 1, 8, 8),)).module()\n"
    )
    return {"model": f"{folder / 'net.py'}:make"}


def orientation_of_arrays(workshop: Workshop, folder: Path) -> Options:
    (folder / "settings.toml").write_text("exif-orientation = true\n")
    return {"config": folder / "settings.toml"}


def other_image_channels(workshop: Workshop, folder: Path) -> Options:
    with np.load(workshop.npz) as whole:
        images = {f"{part}_images": whole[f"{part}_images"].repeat(3, axis=3) for part in ("train", "test")}
    return npz(folder, workshop, **images)


def other_image_size(workshop: Workshop, folder: Path) -> Options:
    with np.load(workshop.npz) as whole:
        images = {f"{part}_images": whole[f"{part}_images"].repeat(2, axis=1) for part in ("train", "test")}
    return npz(folder, workshop, **images) | _saved(folder, "sizeable")


def data_that_is_no_npz(workshop: Workshop, folder: Path) -> Options:
    (folder / "text.npz").write_text("images")
    return {"data": f"npz:{folder / 'text.npz'}"}


def failing_factory(workshop: Workshop, folder: Path) -> Options:
    return factory("failing")


def factory_of_nothing(workshop: Workshop, folder: Path) -> Options:
    return factory("nothing")


def no_such_factory(workshop: Workshop, folder: Path) -> Options:
    return factory("projectd")


def control_flow(workshop: Workshop, folder: Path) -> Options:
    return factory("branching")


def _saved(folder: Path, name: str) -> Options:
    save_file(getattr(user_net, name)().state_dict(), folder / f"{name}.safetensors")
    return factory(name) | {"weights": folder / f"{name}.safetensors"}


def no_layer(workshop: Workshop, folder: Path) -> Options:
    return _saved(folder, "pooling")


def no_prunable_layer(workshop: Workshop, folder: Path) -> Options:
    return _saved(folder, "single")


def unknown_setting(workshop: Workshop, folder: Path) -> Options:
    (folder / "settings.toml").write_text('latency-budgett = "0.5"\n')
    return {"config": folder / "settings.toml"}


def no_settings_file(workshop: Workshop, folder: Path) -> Options:
    return {"config": folder / "none.toml"}


def wrong(**options: object) -> Make:
    return lambda workshop, folder: options


# what is wrong -> (options, words that the line must have)
CASES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "no such model file": (no_model_file, ("none.py", "no such file")),
    "no such weights": (no_weights_file, ("none.safetensors", "no such file")),
    "no such data": (no_data_file, ("none.npz", "no such file")),
    "weights of another model": (other_weights, ("padded.safetensors", "of another model", "layer1.shortcut")),
    "weights with NaN": (nan_weights, ("NaN", "layer1.conv1.weight")),
    "data with other classes": (fewer_classes, ("classes do not match", "(1, 10)", "(1, 7)")),
    "weights with other classes": (fewer_classes_for_a_sized_network, ("classes do not match", "fc.weight", "10")),
    "empty data": (empty_data, ("train_images", "no image")),
    "images with NaN": (nan_images, ("train_images", "NaN", "1 of 1437")),
    "labels out of range": (labels_out_of_range, ("test_labels", "label 10", "0..9")),
    "labels of other images": (labels_of_other_images, ("train_labels", "7 labels for 1437 images")),
    "a network without values": (meta_network, ("net.py:make", "weight, a tensor on the meta device")),
    "an exported network": (exported_network, ("net.py:make", "an exported program", "the module it was exported from")),
    "no such key of a checkpoint": (wrong(checkpoint_key="ema"), ("--checkpoint-key ema", "no state dict under a name")),
    "the orientation of arrays": (orientation_of_arrays, ("--exif-orientation", "imagefolder:DIR")),
    "images with other channels": (
        other_image_channels,
        ("MEAN", "3 numbers", "the data the network was trained on"),
    ),
    "images of another size": (other_image_size, ("user_net.py:sizeable", "fails on an input (1, 1, 16, 8)")),
    "no npz": (data_that_is_no_npz, ("text.npz", "train_images")),
    "a factory that raises": (failing_factory, ("user_net.py:failing", "the licence server does not answer")),
    "a factory that gives nothing": (factory_of_nothing, ("user_net.py:nothing", "NoneType", "torch.nn.Module")),
    "no such factory": (no_such_factory, ("projectd", "did you mean 'projected'?")),
    "control flow": (control_flow, ("depends on the values of its input", "user_net.py", "x.sum() > 0")),
    "no layer": (no_layer, ("nothing can be removed", "no convolution, linear layer or attention")),
    "no prunable layer": (no_prunable_layer, ("nothing can be removed", "conv2d in only: output of the network")),
    "an unknown setting": (unknown_setting, ("'latency-budgett'", "did you mean 'latency-budget'?")),
    "no settings file": (no_settings_file, ("none.toml", "cannot be read")),
    "a budget of 0": (wrong(latency_budget="0"), ("--latency-budget", "'0'", "8ms")),
    "a budget over 1": (wrong(latency_budget="1.5"), ("--latency-budget", "'1.5'", "(0, 1]", "8ms")),
    "a budget below 0": (wrong(latency_budget="-5ms"), ("--latency-budget", "'-5ms'")),
    "a budget out of reach": (wrong(latency_budget="0.0001"), ("latency budget", "fastest reachable")),
    "an unknown target": (wrong(target="toaster"), ("toaster", "x86")),
    "an unknown device": (wrong(device="toaster"), ("toaster", "local")),
    "an unknown score": (wrong(score="luck"), ("--score", "luck", "hasa")),
    "mean for three channels": (wrong(mean="0.5,0.5,0.5", std="0.2,0.2,0.2"), ("--mean", "3 values", "1 image channel")),
    "no evaluations": (wrong(evaluations=0), ("--evaluations", "from 1")),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_line_that_says_what_is_wrong(case: str, workshop: Workshop, tmp_path: Path, here: Call) -> None:
    make, words = CASES[case]
    given = tmp_path / "given"
    given.mkdir()
    out = tmp_path / "run"
    ended = here(workshop.arguments(out, **make(workshop, given)))
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert [word for word in words if word not in ended.complaint] == [], ended.complaint
    assert not any((out / name).exists() for name in ("report.json", "plan.json", "artifacts"))


@pytest.mark.parametrize("make", [meta_network, exported_network])
def test_a_network_that_cannot_be_used_is_one_line_of_an_inspection_too(
    make: Make, workshop: Workshop, tmp_path: Path, here: Call
) -> None:
    ended = here(["inspect", "--model", str(make(workshop, tmp_path)["model"])])
    assert ended.code == 2, ended.err
    assert "net.py:make" in ended.complaint


NOBODY = "~nobody-of-this-name"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--target", "x86", "--model", f"{NOBODY}/net.py:f"],
        ["--target", "x86", "--weights", f"{NOBODY}/net.pt"],
        ["--target", "x86", "--data", f"npz:{NOBODY}/x.npz"],
        ["--target", "x86", "--recipe", f"{NOBODY}/recipe.py"],
        ["inspect", "--model", f"{NOBODY}/net.py:f"],
        ["inspect", "--weights", f"{NOBODY}/net.pt"],
        ["inspect", "--recipe", f"{NOBODY}/recipe.py"],
        ["verify", f"{NOBODY}/run"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_the_home_of_nobody_is_one_line(arguments: list[str], here: Call) -> None:
    ended = here(arguments)
    assert ended.code == 2, ended.err
    assert NOBODY in ended.complaint


@pytest.mark.parametrize("spec", ["npz:{}/x.npz", "imagefolder:{}", "torchvision:CIFAR10:{}", "{}/data.py:f"])
def test_data_in_the_home_of_nobody_are_one_line_when_a_run_is_verified(spec: str, uninterrupted: Path, here: Call) -> None:
    ended = here(["verify", str(uninterrupted), "--data", spec.format(NOBODY)])
    assert ended.code == 2, ended.err
    assert "the home folder of a user of this machine" in ended.complaint


def test_labels_that_are_not_as_many_as_the_images_are_refused_before_pytorch_is_loaded(
    workshop: Workshop, tmp_path: Path
) -> None:
    arguments = workshop.arguments(tmp_path / "run", **labels_of_other_images(workshop, tmp_path))
    body = f"import sys; from edge_compress.pipeline.cli.main import main; code = main({arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{body}; print(code, 'torch' in sys.modules)"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "2 False\n"
    assert "train_labels: found 7 labels for 1437 images" in done.stderr


def without_utf8(arguments: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """The command line in a folder, in a locale that has ASCII alone."""
    plain = environment | {"PYTHONUTF8": "0", "LC_ALL": "C"}
    return subprocess.run([COMMAND, *arguments], cwd=folder, env=plain, capture_output=True, check=False, timeout=120)


def test_a_folder_with_accents_in_a_locale_without_is_no_traceback(
    workshop: Workshop, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "Größe"
    shutil.copytree(uninterrupted, folder / "Läufe")
    helped = without_utf8(["--help"], folder, workshop.environment)
    assert (helped.returncode, helped.stderr) == (0, b"")
    assert b"Usage: edge-compress" in helped.stdout
    for place in ("Läufe", str(folder / "Läufe")):
        verified = without_utf8(["verify", place], folder, workshop.environment)
        assert (verified.returncode, verified.stderr) == (0, b"")
        assert verified.stdout.endswith(b"all checks passed\n")
    run = without_utf8(["--target", "x86", "--dry-run"], folder, workshop.environment)  # its settings could not be written
    assert run.returncode == 2
    assert run.stderr.startswith(b"edge-compress: --out: found ")
    assert run.stderr.endswith(b"set PYTHONUTF8=1: names are read as ascii in this locale\n")


def test_run_folders_whose_names_are_not_utf8_are_no_traceback(uninterrupted: Path, tmp_path: Path, here: Call) -> None:
    odd = [tmp_path / os.fsdecode(name) for name in (b"one\xff", b"other\xfe")]
    for folder in odd:
        shutil.copytree(uninterrupted, folder)
    for arguments in (["report", str(odd[0])], ["verify", str(odd[0])]):
        ended = here(arguments)
        assert (ended.code, ended.err) == (0, "")
        assert r"one\udcff" in ended.out
    page = tmp_path / os.fsdecode(b"page\xff.html")
    ended = here(["report", *map(str, odd), "--out", str(page)])
    assert (ended.code, ended.err) == (0, "")
    assert r"one\udcff" in page.read_text(encoding="utf-8")


def test_after_wrong_input_the_right_command_takes_the_same_folder(workshop: Workshop, tmp_path: Path, here: Call) -> None:
    """A mistake does not lock its folder, and what was asked for first does not stay in it."""
    out = tmp_path / "run"
    assert here(workshop.arguments(out, weights=workshop.weights("padded"))).code == 2
    ended = here(workshop.arguments(out, model=f"{USER_NET}:failing"))
    assert "licence server" in ended.complaint  # and not: the folder holds another run
    assert "failing" in (out / "config.toml").read_text()


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"]
)
def test_code_in_a_weights_file_is_refused_and_does_not_run(
    write: Callable[[object, Path], object], workshop: Workshop, tmp_path: Path, here: Call
) -> None:
    mark, weights = tmp_path / "mark", tmp_path / "net.pt"
    write({"conv1.weight": Trap(mark)}, weights)
    ended = here(workshop.arguments(tmp_path / "run", weights=weights))
    assert ended.code == 2
    assert "net.pt" in ended.complaint
    assert "pickle" in ended.complaint
    assert not mark.exists()


def test_the_folder_of_another_run_is_left_as_it_is(workshop: Workshop, uninterrupted: Path, tmp_path: Path, here: Call) -> None:
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    before = snapshot(folder)
    ended = here(workshop.arguments(folder, seed=1))
    assert ended.code == 2
    assert "holds another run" in ended.complaint
    assert "seed = 1" in ended.complaint
    after = snapshot(folder)
    assert {name: state for name, state in after.items() if name != ".lock"} == {n: s for n, s in before.items() if n != ".lock"}


@pytest.mark.parametrize("existing", ["notes.txt", "stages/search/result.json"])
def test_a_folder_that_is_no_run_is_left_as_it_is(existing: str, workshop: Workshop, tmp_path: Path, here: Call) -> None:
    file = tmp_path / "mine" / existing
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    before = snapshot(tmp_path / "mine")
    ended = here(workshop.arguments(tmp_path / "mine"))
    assert ended.code == 2
    assert "is not a run folder" in ended.complaint
    assert snapshot(tmp_path / "mine") == before


def test_a_file_in_the_place_of_the_folder_is_left_as_it_is(workshop: Workshop, tmp_path: Path, here: Call) -> None:
    (tmp_path / "run").write_text("precious")
    ended = here(workshop.arguments(tmp_path / "run"))
    assert ended.code == 2
    assert "is a file" in ended.complaint
    assert (tmp_path / "run").read_text() == "precious"


def test_no_target_is_wrong_input(here: Call) -> None:
    ended = here(["--data", "digits"])
    assert ended.code == 2
    assert "expected --target " in ended.complaint
    assert "x86" in ended.complaint


@pytest.mark.timeout(600)
def test_a_full_disk_is_exit_code_3_and_what_was_finished_is_kept(
    workshop: Workshop, uninterrupted: Path, tmp_path: Path
) -> None:
    """The run folder on a file system of its own that is too small for the whole run; it is gone with the process."""
    small = tmp_path / "small"
    small.mkdir()
    size = sum(f.stat().st_size for f in uninterrupted.rglob("*") if f.is_file())
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && "$@"; code=$?; ls -R "$0"; exit $code'
    command = ["sh", "-c", script, str(small), str(size // 3), str(small), COMMAND, *workshop.arguments(small / "run")]
    probe = (
        subprocess.run(
            ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", str(small)],
            capture_output=True,
            check=False,
        )
        if shutil.which("unshare")
        else None
    )
    if probe is None or probe.returncode != 0:
        pytest.skip("this machine lets no process mount a file system of its own")
    ran = subprocess.run(
        ["unshare", "--mount", "--map-root-user", *command],
        capture_output=True,
        text=True,
        check=False,
        env=workshop.environment,
        timeout=600,
    )
    ended = Finished(ran.returncode, ran.stdout, ran.stderr)
    assert ended.code == 3, ended.err
    assert "the disk is full" in ended.complaint
    assert "re-run the same command" in ended.complaint
    assert ".tmp" not in ended.out  # nothing half-written is left
    assert "result.json" in ended.out
    assert "report.json" not in ended.out
