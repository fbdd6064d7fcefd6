from __future__ import annotations

import json
import runpy
from pathlib import Path

import edge_compress
import pytest
import torch
from cli_runs import without_progress
from edge_compress.pipeline.cli.main import main

EXAMPLES = Path(edge_compress.__file__).resolve().parent / "examples"
KEYS = {"model", "captured", "parameters", "macs", "prunable_macs_share", "groups", "locked", "equivalence", "seconds"}


def test_the_json_and_only_it_is_on_stdout(capsys):
    assert main(["inspect", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= KEYS
    assert found["model"] == "digits-resnet"
    assert found["captured"] == "export"
    assert found["prunable_macs_share"] == pytest.approx(1.0)
    assert found["equivalence"]["passed"]
    assert found["equivalence"]["largest_relative_difference"] <= 1e-4
    assert {frozenset(group) for group in found["groups"]} == {frozenset(("name", "kind", "units", "macs_share"))}


USER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last, self.wide = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(2, 16, 1)

    def forward(self, x):
        a = self.last(torch.relu(self.conv(x)))
        return {"a": a, "b": torch.cumsum(self.wide(x), 1).mean((2, 3))}

def net():
    return Net()
"""


def test_what_is_locked_is_named_with_its_reason(tmp_path, capsys):
    (tmp_path / "net.py").write_text(USER)
    assert main(["inspect", "--model", f"{tmp_path}/net.py:net", "--input-shape", "2,9,9"]) == 0
    text = capsys.readouterr().out
    assert "wide" in text
    assert "cumsum" in text
    assert "conv: 8 units (channel)" in text
    assert "answer equal" in text


def test_the_state_dict_of_several_is_chosen_as_in_a_run_and_said(tmp_path, capsys):
    (tmp_path / "net.py").write_text(USER)
    net = runpy.run_path(str(tmp_path / "net.py"))["Net"]()
    torch.save({"state_dict": net.state_dict(), "other": {"a": torch.zeros(1)}}, tmp_path / "two.pt")
    asked = ["inspect", "--model", f"{tmp_path}/net.py:net", "--input-shape", "2,9,9", "--weights", str(tmp_path / "two.pt")]
    assert main([*asked, "--checkpoint-key", "state_dict"]) == 0
    assert main([*asked, "--checkpoint-key", "other"]) == 2
    assert "two.pt" in capsys.readouterr().err
    torch.save({"state_dict": net.state_dict(), "state_dict_ema": net.state_dict()}, tmp_path / "two.pt")
    assert main(asked) == 0
    assert "'state_dict_ema' of the checkpoint was used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-shape", "3x4"], "three numbers C,H,W"),
        (["--input-shape", "3,0,4"], "numbers above 0"),
        (["--input-shape", "3,8,8", "--image-size", "8"], "leave one out"),
        (["--model", "torchvision:resnet1000"], "no model 'resnet1000'"),
        (["--model", "nothing"], "unknown model"),
        (["--weights", "absent.pt"], "no such file"),
        (["--checkpoint-key", "ema"], "give --weights"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(options, message, capsys):
    assert main(["inspect", *options]) == 2
    err = without_progress(capsys.readouterr().err)
    assert err.count("\n") == 1
    assert message in err


def test_a_recipe_is_tried_on_a_few_samples(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--recipe", str(EXAMPLES / "classify.py")]) == 0
    out = capfd.readouterr().out
    assert "inputs: input float32 1x8x8; outputs: output float32 10" in out
    assert "samples: train " in out
    assert "top-1 on 16 test samples: " in out
    assert "answer equal" in out


def test_a_metric_that_changes_its_mind_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES / "classify.py").read_text().replace("return 100.0 *", "return float(torch.rand(())) + 100.0 *")
    (tmp_path / "unsure.py").write_text(text)
    assert main(["inspect", "--recipe", str(tmp_path / "unsure.py")]) == 2
    assert "metric().compute()" in (err := capfd.readouterr().err)
    assert "for the same answers" in err
