"""The paper's recipe on stand-in images, by two processes of torchrun: one is killed, both are started again and finish."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import paper
import paper_recipe
import pytest
import torch
from click.testing import CliRunner, Result
from edge_compress.pipeline.errors import InputError
from PIL import Image
from safetensors.torch import load_file, safe_open

BENCHMARKS = Path(paper.__file__).parent
SHIPPED = BENCHMARKS / "paper-resnet50.toml"
EPOCHS = 16

NET = """
from torch import nn

def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights, and pictures of three colours in noise."""
    place = tmp_path_factory.mktemp("paper")
    (place / "net.py").write_text(NET)
    names: dict[str, Any] = {}
    exec(NET, names)
    torch.save(names["small"](3).state_dict(), place / "w.pt")
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 12)):
        for i, name in enumerate(("blue", "green", "red")):
            folder = place / "pictures" / part / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 160, (16, 16, 3))
                pixels[..., 2 - i] += 70
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{n}.png")
    recipe = SHIPPED.read_text().replace("image-size = 224", "image-size = 16").replace("evaluations = 200", "evaluations = 12")
    (place / "small.toml").write_text(recipe)
    return place


def _given(place: Path, out: str = "out") -> list[str]:
    given = ["--config", str(place / "small.toml"), "--model", f"{place}/net.py:small", "--weights", str(place / "w.pt")]
    given += ["--data", f"imagefolder:{place}/pictures", "--batch", "32", "--finetune-epochs", str(EPOCHS), "--images", "64"]
    return [*given, "--learning-rate", "0.01", "--accelerator", "cpu", "--out", str(place / out)]


def _start(place: Path) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [*launcher, str(BENCHMARKS / "paper.py"), *_given(place)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """The report of a run whose second process was killed in training; the epochs it then had; what was said."""
    checkpoint = place / "out" / "finetune.safetensors"
    run = _start(place)
    while run.poll() is None and not checkpoint.is_file():
        time.sleep(0.02)
    assert run.poll() is None, run.communicate()[1]
    os.kill(_workers(run.pid)[-1], signal.SIGKILL)
    with safe_open(checkpoint, "pt") as file:  # torchrun starts both again, which takes seconds
        before = json.loads(file.metadata()["training"])["history"]
    said = run.communicate(timeout=250)[1]
    assert run.returncode == 0, said
    return json.loads((place / "out" / "paper.json").read_text()), before, said


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the processes of torchrun are found in /proc")
@pytest.mark.slow
def test_two_processes_go_on_after_one_was_killed(
    finished: tuple[dict[str, Any], list[dict[str, Any]], str], place: Path
) -> None:
    report, before, said = finished
    assert 0 < len(before) < EPOCHS
    assert report["epochs"][: len(before)] == before  # their seconds too: not done again
    assert [e["epoch"] for e in report["epochs"]] == list(range(1, EPOCHS + 1))
    assert said.count("dense: ") == 2  # started twice
    assert said.count("masks ...") == 1  # kept
    assert report["processes"] == 2
    assert report["sparsity"] == pytest.approx(50.0, abs=0.2)
    assert report["top1"] > report["dense"]["top1"] + 20
    weights, masks = (load_file(place / "out" / f"{name}.safetensors") for name in ("weights", "masks"))
    kept, size = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert kept == round(size / 2)
    assert sum(int((weights[f"{name}.weight"] != 0).sum()) for name in masks) == pytest.approx(kept, abs=1)
    assert report["masks_sha256"]["start"] != report["masks_sha256"]["end"]  # exchanged while it trained
    assert str(place) not in json.dumps(report)


def _call(*given: str) -> Result:
    return CliRunner().invoke(paper.main, list(given))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="see above")
@pytest.mark.slow
def test_another_number_of_processes_is_another_run(
    finished: tuple[dict[str, Any], list[dict[str, Any]], str], place: Path
) -> None:
    result = _call(*_given(place))
    assert result.exit_code == 2
    assert "a run with processes 2, expected 1" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sparsty = 50.0", "unknown setting 'sparsty'; did you mean 'sparsity'?"),
        ("latency-budget = 0.5", "unknown setting 'latency-budget'"),
        ("batch = 0", "--batch: found 0, expected a whole number from 2"),
        ("batch = 12.5", "--batch: found 12.5"),
        ('score = "hassa"', "--score: found 'hassa'"),
        ("sparsity = nan", "--sparsity: found nan"),
        ("sparsity", "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(line + "\n")
    result = _call("--config", str(tmp_path / "r.toml"), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_shipped_recipe_is_the_papers() -> None:
    recipe, config = paper_recipe.load(SHIPPED, {})
    assert (config.model, config.finetune_epochs, config.mask, config.search) == ("torchvision:resnet50", 200, "dynamic", "ppo")
    assert (recipe.sparsity, recipe.learning_rate, recipe.batch) == (50.0, 1e-3, 256)
    changed, _ = paper_recipe.load(SHIPPED, {"sparsity": 80.0, "batch": None})
    assert (changed.sparsity, changed.batch) == (80.0, 256)
    with pytest.raises(InputError, match="cannot be read"):
        paper_recipe.load(SHIPPED.with_name("none.toml"), {})


def test_the_help_claims_no_figure() -> None:
    text = " ".join(_call("--help").output.split())
    assert "The figures of the paper were not reproduced here" in text
    assert "torchrun --nproc-per-node 8 benchmarks/paper.py --config" in text
