from __future__ import annotations

import json

import pytest
from edge_compress.pipeline.cli.main import main

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-shape", "3x4"], "three numbers C,H,W"),
        (["--input-shape", "3,0,4"], "numbers above 0"),
        (["--input-shape", "3,8,8", "--image-size", "8"], "leave one out"),
        (["--model", "torchvision:resnet1000"], "no model 'resnet1000'"),
        (["--model", "nothing"], "unknown model"),
        (["--weights", "absent.pt"], "no such file"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(options, message, capsys):
    assert main(["inspect", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
