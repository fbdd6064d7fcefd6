"""Second moments are those of what the layers read, whatever the memory allows to be held."""

from __future__ import annotations

import gc
from pathlib import Path

import nets
import pytest
import torch
from edge_compress.pipeline.errors import UnavailableError
from edge_compress.pipeline.network.compute import Compute
from edge_compress.pipeline.score.layer_moments import BYTES_PER_ENTRY, CHUNK, LayerMoments
from safetensors import SafetensorError
from torch import nn


@pytest.mark.parametrize("name", ["OptionA", "Mobile", "Vgg", "Grouped"])
def test_moments_are_the_products_of_what_each_layer_reads(name: str) -> None:
    net, _ = nets.subject(name)
    inputs = nets.images(30, 4)
    seen: dict[str, torch.Tensor] = {}
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)}
    hooks = [
        layer.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(f"{name}.weight", i[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        net(inputs)
    for hook in hooks:
        hook.remove()
    found = LayerMoments(net, inputs)
    assert set(found.gram) == set(seen)
    for weight, x in seen.items():
        layer = layers[weight.removesuffix(".weight")]
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).movedim(1, -1)
        rows = x.reshape(-1, x.shape[-1]).double()
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        gram = found.gram[weight] if layer.bias is not None else found.gram[weight][:-1, :-1]
        torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
        assert layer.bias is not None or not found.gram[weight][-1].any()


def test_a_small_rest_of_the_samples_is_left_out() -> None:
    net, _ = nets.subject("Vgg")
    whole, more = (LayerMoments(net, nets.images(CHUNK + rest, 4)) for rest in (0, 3))
    assert all(torch.equal(gram, more.gram[name]) for name, gram in whole.gram.items())


def test_moments_that_do_not_fit_together_are_computed_in_parts_and_are_the_same(tmp_path: Path) -> None:
    net, _ = nets.subject("OptionA")
    inputs = nets.images(12)
    whole = LayerMoments(net, inputs)
    widest = max(len(gram) - 1 for gram in whole.gram.values())
    bound = BYTES_PER_ENTRY * widest**2
    parts = LayerMoments(net, inputs, Compute(memory_bytes=bound), folder=tmp_path / "parts")
    assert any("parts" in remark for remark in parts.remarks())
    for name, gram in whole.gram.items():
        assert torch.equal(parts.gram[name], gram)
        assert sum(value.numel() for value in parts.gram._held.values()) <= len(gram) ** 2
    assert parts.energy.keys() == whole.energy.keys()
    assert list((tmp_path / "parts").iterdir())
    del parts
    gc.collect()
    assert not (tmp_path / "parts").exists()
    assert not list(whole.remarks())
    tight = LayerMoments(net, inputs, Compute(memory_bytes=bound - 1), folder=tmp_path / "tight")
    assert tight.left_out
    assert set(tight.gram) == set(whole.gram) - set(tight.left_out)
    assert any("do not fit" in remark for remark in tight.remarks())


def test_a_full_disk_under_the_moments_files_is_said_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("edge_compress.pipeline.score.layer_moments.save_file", full)
    net, _ = nets.subject("OptionA")
    whole = LayerMoments(net, nets.images(12))
    bound = BYTES_PER_ENTRY * max(len(gram) - 1 for gram in whole.gram.values()) ** 2
    parts = LayerMoments(net, nets.images(12), Compute(memory_bytes=bound), folder=tmp_path / "parts")
    with pytest.raises(UnavailableError, match="disk is full"):
        dict(parts.gram.items())
