"""The order of the stages: what a run leaves behind when it cannot go through all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import user_net
from safetensors.torch import save_file

REFUSING = """
import sys
from edge_compress.pipeline.errors import BuildError
from edge_compress.targets.x86 import TARGET
def refuse(*_):
    raise BuildError("the exporter refused the network", found="aten::strange in module body.3")
type(TARGET).baseline = type(TARGET).prober = refuse
from edge_compress.pipeline.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_network_that_the_converter_refuses_before_the_search_has_a_report_that_says_so(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    save_file(user_net.projected().state_dict(), tmp_path / "net.safetensors")
    options = ["--target", "x86", "--model", f"{user_net.__file__}:projected", "--weights", str(tmp_path / "net.safetensors")]
    command = [sys.executable, "-c", REFUSING, *options, "--accept-chance", "--out", str(tmp_path / "run"), *flags]
    environment = os.environ | {"EDGE_COMPRESS_CACHE": str(tmp_path / "cache")}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("edge-compress: the exporter refused the network: found aten::strange")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["schema"], report["passed"], report["model"]["name"]) == (1, False, "user_net.py:projected")
    target = report["targets"]["x86"]
    assert (target["status"], target["verdict"]["passed"], target["artifact"]) == ("failed", False, None)
    assert "aten::strange in module body.3" in target["verdict"]["reasons"][0]
    assert (target["latency"]["kind"], target["accuracy"]["top1"]) == ("none", None)
    assert "aten::strange" in (tmp_path / "run" / "report.md").read_text()
    assert ended.stdout == "" if not flags else json.loads(ended.stdout) == report
