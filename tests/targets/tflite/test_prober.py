"""Latency models of networks that were cut before they came here, whose layers need not be found in the converted file."""

import numpy as np
import pytest
import torch
import user_net
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.base import Structure
from edge_compress.targets.phone import TARGET

pytestmark = pytest.mark.skipif(TARGET.missing() is not None, reason=f"phone: {TARGET.missing()}")


def test_layers_are_only_looked_for_in_the_file_when_they_are_to_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_compress.targets.tflite import prober as tflite_prober
    from edge_compress.targets.tflite.run import predictor

    def lost(*_: object) -> None:
        raise BuildError("layer attentions.0.qkv in the converted network")

    monkeypatch.setattr(tflite_prober, "layer_names", lost)
    torch.manual_seed(0)
    prober = TARGET.prober(user_net.attending().eval(), image_signature((1, 8, 8)), Precision.FP32)
    data = prober.candidate(Structure({}))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    assert predictor(data)(pixels).shape == (2, 10)
    with pytest.raises(BuildError, match=r"layer attentions.0.qkv"):
        prober.candidate(Structure({"attentions.0.qkv": (16, 24)}))
