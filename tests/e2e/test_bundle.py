"""A finished run becomes a bundle that anyone can check."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_runs import Finished, report_of
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.errors import VerifyError
from edge_compress.pipeline.release import bundle
from edge_compress.pipeline.verify import golden

pytest.importorskip("cyclonedx", reason="the bill of materials needs the extra [release]")
Call = Callable[[list[str]], Finished]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dist")


@pytest.fixture
def shipped(uninterrupted: Path, dist: Path, here: Call) -> Path:
    """The usual run's bundle."""
    if not list(dist.glob("*.tar.gz")):
        finished = here(["release", str(uninterrupted), "--out", str(dist)])
        assert finished.code == 0, finished.err
    (path,) = dist.glob("*.tar.gz")
    return path


def test_a_run_keeps_test_images_with_the_artifacts_answers(uninterrupted: Path) -> None:
    entry = report_of(uninterrupted)["targets"]["x86"]["golden"]
    kept = golden.read(uninterrupted / entry["path"])
    test = load_data("digits", seed=0).test
    (pixels,), (logits,) = kept.inputs, kept.outputs
    assert len(pixels) == golden.SAMPLES
    found = {image.tobytes(): label for image, label in zip(test.read(np.arange(len(test))), test.labels, strict=True)}
    labels = np.array([found[image.tobytes()] for image in pixels])
    assert (logits.argmax(axis=1) == labels).mean() > 0.7
    assert kept.where.runtime == "onnxruntime"


def test_a_bundle_of_a_real_run_verifies_with_its_data(shipped: Path, here: Call) -> None:
    finished = here(["verify", str(shipped), "--data", "digits"])
    assert finished.code == 0, finished.err
    assert "identical outputs" in finished.out
    assert "agrees with the recorded" in finished.out


def test_a_run_that_was_moved_gives_the_same_bytes(shipped: Path, uninterrupted: Path, here: Call, tmp_path: Path) -> None:
    moved = shutil.copytree(uninterrupted, tmp_path / "moved")
    assert here(["release", str(moved), "--out", str(tmp_path / "dist")]).code == 0
    assert (tmp_path / "dist" / shipped.name).read_bytes() == shipped.read_bytes()


def test_a_thousand_flipped_bits_of_a_real_bundle_are_found(shipped: Path, tmp_path: Path) -> None:
    data, copy, rng = shipped.read_bytes(), tmp_path / shipped.name, random.Random(1)
    for bit in rng.sample(range(8 * len(data)), 1000):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(changed)
        with pytest.raises(VerifyError, match=shipped.name):
            bundle.read(copy)


def test_a_run_is_no_worse_than_itself_and_worse_than_a_better_one(uninterrupted: Path, here: Call, tmp_path: Path) -> None:
    stored = uninterrupted / "report.json"
    finished = here(["verify", str(uninterrupted), "--against", str(stored)])
    assert finished.code == 0, finished.err
    assert finished.out.startswith("## edge-compress: uninterrupted no worse than before")
    better = json.loads(stored.read_text())
    speedup = better["targets"]["x86"]["latency"]["speedup"]
    speedup["ci95"] = [value * 10 for value in speedup["ci95"]]
    del better["sha256"]  # else it is refused as changed
    (tmp_path / "better.json").write_text(json.dumps(better))
    finished = here(["verify", str(uninterrupted), "--against", str(tmp_path / "better.json")])
    assert finished.code == 1
    assert "lies below the stored" in finished.complaint


def test_two_runs_on_one_page(uninterrupted: Path, here: Call, tmp_path: Path) -> None:
    other = shutil.copytree(uninterrupted, tmp_path / "other")
    page = tmp_path / "pages" / "both.html"
    assert here(["report", str(uninterrupted), str(other), "--out", str(page)]).code == 0
    text = page.read_text(encoding="utf-8")
    assert "2 runs compared" in text
    assert "The plans of uninterrupted and other are the same." in text
