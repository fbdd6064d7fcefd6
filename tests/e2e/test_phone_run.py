"""A whole run for the phone target on the digits: every gate passed, and what the report says holds in LiteRT alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_runs import Workshop, report_of
from edge_compress import targets
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.verify.golden import read
from printed import printed

lacking = targets.load("phone").missing()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.skipif(lacking is not None, reason=f"phone: {lacking}")]


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phone") / "run"
    finished = workshop.call(workshop.arguments(folder, target="phone", search="knapsack", evaluations=10, score="magnitude"))
    assert finished.code == 0, finished.err
    assert finished.out.splitlines()[0].startswith("phone: passed")
    assert {"build phone", "verify phone"} <= set(finished.stages)
    return folder


def test_the_report_counts_latencies_and_says_how_good_the_table_is(folder: Path) -> None:
    search = report_of(folder)["pruned"]["search"]
    assert search["latency_measured"] + search["latency_reused"] >= search["evaluations"]
    assert search["latency_measured"] > 0
    assert 0 <= search["table_error"] < 1
    assert "median error" in (folder / "report.md").read_text(encoding="utf-8")


def test_the_file_alone_answers_raw_pixels_as_the_report_says(folder: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    report = report_of(folder)["targets"]["phone"]
    assert report["artifact"]["format"] == "tflite"
    assert report["artifact"]["options"]["transposes"] == "0"
    assert report["latency"]["speedup"]["ci95"][0] > 1.0
    assert report["latency"]["kind"] == report["accuracy"]["kind"] == "measured"
    interpreter = Interpreter(model_path=str(folder / report["artifact"]["path"]))
    interpreter.allocate_tensors()
    (image,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert image["quantization"] == (1.0, -128)
    test = load_data("digits", seed=0).test
    right = 0
    for pixels, label in zip(test.read(np.arange(len(test))), test.labels, strict=True):
        interpreter.set_tensor(image["index"], (pixels.astype(np.int16) - 128).astype(np.int8)[None])
        interpreter.invoke()
        right += int(interpreter.get_tensor(logits["index"]).argmax() == label)
    assert 100.0 * right / len(test) == pytest.approx(report["accuracy"]["top1"])


def test_its_bundle_verifies_in_litert(folder: Path, workshop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx", reason="the bill of materials needs the extra [release]")
    assert workshop.call(["release", str(folder), "--out", str(tmp_path)]).code == 0
    (path,) = tmp_path.glob("*.tar.gz")
    finished = workshop.call(["verify", str(path), "--data", "digits"])
    assert finished.code == 0, finished.err
    assert "golden samples in litert" in finished.out
    assert "identical outputs" in finished.out


def test_the_code_that_is_printed_classifies_stored_pixels_as_the_artifact_did(folder: Path) -> None:
    report = report_of(folder)["targets"]["phone"]
    assert report["artifact"]["inputs"][0]["layout"] == "NHWC"
    assert (report["artifact"]["inputs"][0]["dtype"], report["artifact"]["inputs"][0]["zero_point"]) == ("int8", -128)
    golden = read(folder / report["golden"]["path"])
    for language in ("Python", "Python (CompiledModel)"):
        _, predict = printed(folder, "phone", language)
        for pixels, logits in zip(golden.inputs[0], golden.outputs[0], strict=True):
            np.testing.assert_allclose(predict(pixels), logits, rtol=1e-4, atol=1e-5)
