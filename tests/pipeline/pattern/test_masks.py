"""Masks of attention whose output projection is read and never called."""

from __future__ import annotations

from pathlib import Path

import nets
import pytest
import torch
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.network.compute import CPU
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.pattern.masks import Masks
from edge_compress.pipeline.run_folder import RunFolder
from edge_compress.pipeline.score.connections import ConnectionScores
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.types import Sensitivity
from torch import Tensor, nn

PROJECTION = "attention.out_proj"


class Attending(nn.Module):
    """Patches, nn.MultiheadAttention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attention = nn.Conv2d(1, 16, 2, 2), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


def images() -> Tensor:
    return nets.digits()[0][:100]


def masks_by(score: str, root: Path) -> Masks:
    captured = capture(nets.drawn(Attending), images()[:1])
    scores = ConnectionScores(captured.module, images, score, 0)
    return Masks(captured, image_signature((1, 8, 8), 10), Pattern.WEIGHT, scores, root, images, CPU)


def test_what_is_advised_where_a_layer_is_never_called_works(tmp_path: Path) -> None:
    with RunFolder(Config(("x86",), out=tmp_path / "run"), pytest.fail) as folder:
        curved = masks_by("hasa", folder.path)
        assert PROJECTION in {knob.name for knob in curved.knobs}
        with pytest.raises(InputError, match=rf"layer '{PROJECTION}' is used outside .* use --score magnitude"):
            curved.scores.at(0.5)
        way = masks_by("magnitude", folder.path)
        levels = tuple(len(knob.kept) - 1 for knob in way.knobs)
        plan = way.plan(levels, Sensitivity("magnitude", 0.0, {}), folder.stage("search", "1", {}))
        solved = way.solved(plan, images())
        mask = way.masks(plan)[f"{PROJECTION}.weight"]
    weight = solved.get_parameter(f"{PROJECTION}.weight").detach()
    assert int(mask.sum()) == round(0.05 * mask.numel())
    assert not weight[mask == 0].any()
    with torch.no_grad():
        assert solved(images()).isfinite().all()
