"""What goes with files that become TensorRT engines elsewhere: a script that builds them there, and a manifest."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ...devices.tensorrt import trtexec
from ...devices.tensorrt.trtexec import Version
from ...targets.base import BuildRequest
from ..files import atomic_write, sha256_file
from ..options import Precision
from ..signature import FileTensor
from ..types import Artifact

SCRIPT, MANIFEST = "build.sh", "manifest.json"
_MAJORS = {"10": Version(10, 3, 0), "11": Version(11, 0, 0)}
_ENGINES = ("baseline", "model")

_HEAD = """#!/bin/sh
# Builds the TensorRT engines of this folder. Run it on the Jetson they are for:
#     sh build.sh           model.engine and baseline.engine
#     sh build.sh --time    and how long an inference takes, each engine in turn, there and back
# An engine works with the GPU, the TensorRT and the power mode it was built with; do not copy it to another board.
# Exit codes: 0, 1 TensorRT refused a file, 2 a file is not what the manifest says, 3 there is no trtexec of TensorRT 10 or 11.
set -eu
cd "$(dirname "$0")"
trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
if ! [ -x "$trtexec" ]; then
    echo "build.sh: no trtexec at $trtexec; sudo apt install nvidia-jetpack, or set TRTEXEC" >&2
    exit 3
fi
version=$("$trtexec" --help | sed -n 's/.*\\[TensorRT v\\([0-9]*\\)\\].*/\\1/p' | head -n 1)
run() {
    log=$1
    shift
    if ! "$@" >"$log" 2>&1; then
        grep -F '[E]' "$log" >&2 || tail -n 5 "$log" >&2
        echo "build.sh: trtexec failed; its log is $log" >&2
        exit 1
    fi
}
"""


def write(folder: Path, artifact: Artifact, request: BuildRequest) -> None:
    """Put the script and the manifest beside an artifact's files; `artifact` has paths relative to `folder`."""
    assert artifact.baseline is not None  # every target builds one
    precisions = {"baseline": Precision.FP32, "model": artifact.precision}
    files = {"baseline": artifact.baseline, "model": artifact.file}
    sparse = "two_four_layers" in artifact.options
    commands = {
        major: {
            name: trtexec.build_command(
                ("trtexec",),
                files[name].path,
                f"{name}.engine",
                version,
                precisions[name],
                sparse=sparse and name == "model",
                cache="timing.cache",
                layers=f"{name}.layers.json",
            )
            for name in _ENGINES
        }
        for major, version in _MAJORS.items()
    }
    atomic_write(folder / SCRIPT, _script(commands, {ref.path: ref.sha256 for ref in files.values()}))
    manifest: dict[str, Any] = {
        "schema": 2,
        "engine": "not_built",
        "tensorrt": {"oldest": "10.3 (JetPack 6.2)", "newest": "11.x"},
        "precision": str(artifact.precision),
        "files": {name: {"path": ref.path, "sha256": ref.sha256, "size_bytes": ref.size_bytes} for name, ref in files.items()},
        "script": {"path": SCRIPT, "sha256": sha256_file(folder / SCRIPT)},
        "inputs": [_described(tensor) for tensor in artifact.inputs],
        "outputs": [_described(tensor) for tensor in artifact.outputs],
        "classes": request.classes,
        "two_four_layers": int(artifact.options.get("two_four_layers", "0")),
        "checks": [note for note in artifact.notes if "parser" in note] + [f"linter: {artifact.options['linter']}"],
        "commands": commands,
    }
    if request.signature.is_image_classifier:
        values = "(pixel / 255 - mean) / std, per channel, RGB where there are three"
        manifest["preprocessing"] = {"values": values, "mean": request.mean, "std": request.std}
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _described(tensor: FileTensor) -> dict[str, Any]:
    return {"name": tensor.name, "shape": tensor.shape, "type": tensor.dtype, "values": tensor.scaling}


def _script(commands: dict[str, dict[str, list[str]]], digests: dict[str, str]) -> str:
    lines = [_HEAD.rstrip("\n")]
    sums = "\\n".join(f"{digest}  {path}" for path, digest in digests.items())
    lines.append(f"if ! printf '{sums}\\n' | sha256sum -c --status; then")
    lines.append('    echo "build.sh: an .onnx file is not what the manifest says; copy the folder again" >&2')
    lines += ["    exit 2", "fi", "case $version in"]
    for major, by_name in commands.items():
        lines.append(f"{major}????)")
        for name, command in by_name.items():
            lines.append(f'    run {name}.build.log "$trtexec" {shlex.join(command[1:])}')
        lines.append("    ;;")
    lines += [
        "*)",
        '    echo "build.sh: TensorRT ${version:-of no known version}; 10 or 11 is needed" >&2',
        "    exit 3",
        "    ;;",
    ]
    lines += ["esac", 'echo "built: model.engine, baseline.engine"', 'if [ "${1:-}" = --time ]; then']
    lines.append("    for turn in 1 2 3; do")
    for name in (*_ENGINES, *reversed(_ENGINES)):
        command = trtexec.time_command(("trtexec",), f"{name}.engine", f"{name}.times.json", 250)
        lines.append(f'        run {name}.time.log "$trtexec" {shlex.join(command[1:])}')
        lines.append(f"        sed -n 's/.*GPU Compute Time: /{name}: /p' {name}.time.log")
    return "\n".join([*lines, "    done", "fi", ""])
