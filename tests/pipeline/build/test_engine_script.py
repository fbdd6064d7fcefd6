"""The script that builds engines on a board: run here, with a stand-in for trtexec in the board's place."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from edge_compress.pipeline.build import engine_script as engine_files
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.signature import FileTensor, Signature, TensorSpec, image_signature
from edge_compress.pipeline.types import Artifact, FileRef
from edge_compress.targets.base import AS_GIVEN, AS_RETURNED, BuildRequest, scaling_of

STANDIN = Path(__file__).parents[2] / "support" / "trtexec_standin.py"


def reference(path):
    data = path.read_bytes()
    return FileRef(path.name, hashlib.sha256(data).hexdigest(), len(data))


CLASSIFIER = image_signature((3, 8, 8), 2)
RECIPE = Signature(
    (TensorSpec("ids", (6,), "int64"), TensorSpec("scale", (4,))),
    (TensorSpec("boxes", (4,)), TensorSpec("kinds", (), "int64")),
    True,
)


@pytest.fixture
def folder(tmp_path):
    """An image classifier's folder in a run, with what is written beside the files."""
    return written(tmp_path / "with space" / "jetson", CLASSIFIER, ("cat", "dog"), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


def written(folder, signature, classes=(), mean=(), std=()):
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"int8 model")
    (folder / "baseline.onnx").write_bytes(b"float model")
    artifact = Artifact(
        "jetson",
        reference(folder / "model.onnx"),
        "onnx",
        Precision.INT8,
        signature.inputs[0].name,
        (1, *signature.inputs[0].shape),
        notes=("not seen by NVIDIA's parser: absent",),
        options={"linter": "nothing found", "two_four_layers": "3"},
        baseline=reference(folder / "baseline.onnx"),
        inputs=tuple(FileTensor(s.name, (1, *s.shape), "", s.dtype, scaling_of(mean, std)) for s in signature.inputs),
        outputs=tuple(FileTensor(s.name, (1, *s.shape), "", s.dtype, AS_RETURNED) for s in signature.outputs),
    )
    module = torch.nn.Identity()
    request = BuildRequest(
        module,
        b"float model",
        signature,
        classes,
        Precision.INT8,
        [np.zeros((1, 3, 8, 8), np.float32)],
        lambda p: 0.0,
        folder,
        mean=mean,
        std=std,
    )
    engine_files.write(folder, artifact, request)
    return folder


@pytest.fixture
def board(tmp_path, folder):
    """Runs the script with a stand-in that is told how to behave: (exit code, stdout, stderr)."""
    program = tmp_path / "trtexec"
    program.write_text(STANDIN.read_text().replace('"""A', f'#!{sys.executable}\n"""A', 1))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def run(*arguments, place=program, **told):
        (tmp_path / "trtexec.json").write_text(json.dumps({"version": "100300", **told}))
        environment = os.environ | {"TRTEXEC": str(place)}
        command = ["sh", str(folder / engine_files.SCRIPT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return run


def options_of(folder, name):
    return set(json.loads((folder / f"{name}.engine").read_bytes().split(b"\n", 1)[1])["options"])


@pytest.mark.parametrize(("version", "weak"), [("100300", True), ("101602", True), ("110401", False)])
def test_both_engines_are_built_with_the_flags_of_the_version_that_is_there(folder, board, version, weak):
    code, out, err = board(version=version)
    assert (code, err) == (0, "")
    assert "built: model.engine, baseline.engine" in out
    assert ({"--int8", "--fp16"} <= options_of(folder, "model")) is weak
    assert not {"--int8", "--fp16"} & options_of(folder, "baseline")
    assert (folder / "timing.cache").stat().st_size == 16


def test_it_times_the_engines_in_turn_when_asked(folder, board):
    code, out, _ = board("--time")
    assert code == 0
    names = [line.split(":")[0] for line in out.splitlines() if "min = " in line]
    assert names == ["baseline", "model", "model", "baseline"] * 3
    assert "min =" not in board()[1]


@pytest.mark.parametrize("version", ["8602", "090000", "120000"])
def test_a_tensorrt_it_does_not_know_is_refused(folder, board, version):
    code, _, err = board(version=version)
    assert code == 3
    assert f"TensorRT {version}; 10 or 11 is needed" in err
    assert not list(folder.glob("*.engine"))


def test_without_trtexec_it_says_what_to_install(board, tmp_path):
    code, _, err = board(place=tmp_path / "nowhere")
    assert code == 3
    assert "sudo apt install nvidia-jetpack" in err


def test_a_file_that_changed_on_the_way_is_not_built(folder, board):
    (folder / "model.onnx").write_bytes(b"another")
    code, _, err = board()
    assert code == 2
    assert "not what the manifest says" in err


def test_what_tensorrt_refuses_is_shown_and_the_log_is_kept(folder, board):
    code, _, err = board(fail="parse")
    assert code == 1
    assert "checkUnique" in err
    assert "Failed to parse onnx file" in (folder / "baseline.build.log").read_text()


def test_the_manifest_says_what_a_board_needs_to_know_and_has_no_latency(folder):
    manifest = json.loads((folder / engine_files.MANIFEST).read_text())
    assert manifest["engine"] == "not_built"
    assert manifest["files"]["model"]["sha256"] == hashlib.sha256(b"int8 model").hexdigest()
    scaling = scaling_of((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert manifest["inputs"] == [{"name": "input", "shape": [1, 3, 8, 8], "type": "float32", "values": scaling}]
    assert manifest["outputs"] == [{"name": "logits", "shape": [1, 2], "type": "float32", "values": AS_RETURNED}]
    assert manifest["classes"] == ["cat", "dog"]
    assert (manifest["preprocessing"]["mean"], manifest["preprocessing"]["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert set(manifest["commands"]) == {"10", "11"}
    assert "--sparsity=enable" in manifest["commands"]["10"]["model"]
    assert "--sparsity=disable" in manifest["commands"]["10"]["baseline"]
    assert not [key for key in json.dumps(manifest).split('"') if key.endswith("_ms") or "latency" in key]


def test_the_manifest_of_a_network_that_is_no_classifier_names_all_its_tensors_and_scales_no_pixels(tmp_path):
    manifest = json.loads((written(tmp_path / "jetson", RECIPE) / engine_files.MANIFEST).read_text())
    described = {part: [(t["name"], t["shape"], t["type"]) for t in manifest[part]] for part in ("inputs", "outputs")}
    assert described == {
        "inputs": [("ids", [1, 6], "int64"), ("scale", [1, 4], "float32")],
        "outputs": [("boxes", [1, 4], "float32"), ("kinds", [1], "int64")],
    }
    assert {t["values"] for t in manifest["inputs"]} == {AS_GIVEN}
    assert manifest["classes"] == []
    assert "pixel" not in json.dumps(manifest)


@pytest.mark.skipif(shutil.which("dash") is None, reason="no dash: `sh` may be anything")
def test_the_script_is_posix(folder):
    assert subprocess.run(["dash", "-n", str(folder / engine_files.SCRIPT)], check=False).returncode == 0
