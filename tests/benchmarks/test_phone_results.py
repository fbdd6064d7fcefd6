"""The committed .tflite files are those that their reports and the comparison with other files speak of."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from edge_compress.pipeline.files import sha256_file
from edge_compress.targets import phone

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results" / "phone"
# file, most bytes and least accuracy, and the file of equal size it is compared with
CLAIMS = (
    ("cifar10-98k", 98_496, 88.5, "pretrainedResnet_quant.tflite"),
    ("cifar10-512k", 512_024, 92.5, "pretrainedResnet_large_int8.tflite"),
)


def rows() -> dict[str, dict[str, Any]]:
    table = json.loads((FOLDER / "peers.json").read_text(encoding="utf-8"))
    return {row["file"]: row for row in table["rows"]}


@pytest.mark.parametrize(("name", "limit", "least", "peer"), CLAIMS)
def test_a_file_is_the_one_its_report_was_written_of(name: str, limit: int, least: float, peer: str) -> None:
    report = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    path, target = FOLDER / f"{name}.tflite", report["targets"]["phone"]
    assert (sha256_file(path), path.stat().st_size) == (target["artifact"]["sha256"], target["artifact"]["size_bytes"])
    assert path.stat().st_size <= limit == report["gates"]["max_size_bytes"]
    assert target["accuracy"]["top1"] >= least
    assert (target["accuracy"]["kind"], target["accuracy"]["samples"]) == ("measured", 5000)
    assert target["verdict"] == {"passed": True, "reasons": []}
    assert len(zipfile.Path(path, "labels.txt").read_text(encoding="utf-8").splitlines()) == 10


@pytest.mark.parametrize(("name", "limit", "least", "peer"), CLAIMS)
def test_no_file_is_slower_than_the_one_it_is_compared_with(name: str, limit: int, least: float, peer: str) -> None:
    ours, theirs = rows()[f"{name}.tflite"], rows()[peer]
    assert ours["sha256"] == sha256_file(FOLDER / f"{name}.tflite")
    assert ours["faster_than"][peer]["ci95"][0] >= 1.0
    assert ours["top1"] > theirs["top1"]
    assert ours["size_bytes"] <= theirs["size_bytes"]


@pytest.mark.skipif(phone.TARGET.missing() is not None, reason=f"phone: {phone.TARGET.missing()}")
@pytest.mark.parametrize("name", [claim[0] for claim in CLAIMS])
def test_a_file_takes_raw_pixels(name: str) -> None:
    """As the files it is compared with: the pixel minus 128 in int8, nothing else to be done before."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(FOLDER / f"{name}.tflite"))
    (image,) = interpreter.get_input_details()
    assert (tuple(image["shape"]), image["dtype"], image["quantization"]) == ((1, 32, 32, 3), np.int8, (1.0, -128))
